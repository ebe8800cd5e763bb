package launch

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload"
)

// TestGateway is what a machine gets of an image: its objects, the image's key
// under an identity of its own, and nothing else.
func TestGateway(t *testing.T) {
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	store, err := upload.Open(t.Context(), "file://"+t.TempDir(), upload.Options{})
	ok(err)
	defer store.Close()
	manifest, root, pack := chunked.NameOf([]byte("m")), chunked.NameOf([]byte("r")), chunked.NameOf([]byte("p"))
	for key, data := range map[string]string{
		chunked.ManifestKey("web", manifest): "m", chunked.KeysKey("web", manifest): "everybody's", chunked.PackKey(pack): "0123456789",
		chunked.HeadKey("web"): "head", "secret": "s", chunked.ManifestKey("db", manifest): "db",
	} {
		_, err := upload.PutBytes(t.Context(), store, key, []byte(data), upload.PutOptions{})
		ok(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ok(err)
	defer l.Close()
	key := chunked.Key{1, 2, 3}
	g, err := newGateway(&Image{Objects: store, Name: "web", Manifest: manifest, Root: root, Key: key, Signers: "web ssh-ed25519 AAAA", Mode: ticket.Lazy, Cache: "http://10.0.2.2:1"}, l)
	ok(err)

	id, err := age.GenerateX25519Identity()
	ok(err)
	body, err := json.Marshal(ticket.Request{Version: ticket.Version, Recipient: id.Recipient().String()})
	ok(err)
	sealed, err := g.Claim(t.Context(), &metadata.Instance{ID: "i-1"}, body)
	ok(err)
	r, err := age.Decrypt(bytes.NewReader(sealed), id)
	ok(err)
	var got ticket.Ticket
	ok(json.NewDecoder(r).Decode(&got))
	if got.InstanceID != "i-1" || got.Mode != ticket.Lazy || got.Manifest != chunked.ManifestKey("web", manifest) || got.Cache == "" || !strings.HasPrefix(got.Endpoint, "http://10.0.2.2:") {
		t.Errorf("%+v", got)
	}
	for _, bad := range []string{"", "{}", `{"version":1,"recipient":"x"}`} {
		if _, err := g.Claim(t.Context(), &metadata.Instance{ID: "i-1"}, []byte(bad)); err == nil {
			t.Errorf("a ticket for %q", bad)
		}
	}

	prefix := "/" + strings.TrimPrefix(got.Store, "s3://") + "/"
	ask := func(method, path, span string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(method, path, nil)
		if span != "" {
			req.Header.Set("Range", span)
		}
		w := httptest.NewRecorder()
		g.ServeHTTP(w, req)
		return w
	}
	keysObject := ask("GET", prefix+chunked.KeysKey("web", manifest), "")
	list, err := chunked.ParseKeysObject(keysObject.Body.Bytes())
	ok(err)
	ids, err := keys.ParseIdentities([]byte(got.IndexKey))
	ok(err)
	if opened, err := list.IndexKey(root, ids...); err != nil || opened != key {
		t.Errorf("the index key is %v, %v", opened, err)
	}
	for _, c := range []struct {
		method, path, span string
		status             int
		want               string
	}{
		{"GET", prefix + chunked.ManifestKey("web", manifest), "", 200, "m"},
		{"GET", prefix + chunked.PackKey(pack), "", 200, "0123456789"},
		{"GET", prefix + chunked.PackKey(pack), "bytes=2-4", 206, "234"},
		{"GET", prefix + chunked.PackKey(pack), "bytes=8-20", 206, "89"},
		{"GET", prefix + chunked.PackKey(pack), "bytes=50-60", 416, ""},
		{"GET", prefix + chunked.PackKey(pack), "bytes=4-2", 400, ""},
		{"GET", prefix + chunked.PackKey(pack), "lines=1-2", 400, ""},
		{"GET", prefix + chunked.TraceKey("web", manifest), "", 404, ""},
		{"GET", prefix + chunked.PackKey(root), "", 404, ""},
		{"PUT", prefix + chunked.PackKey(pack), "", 403, ""},
		{"GET", prefix + chunked.HeadKey("web"), "", 403, ""},
		{"GET", prefix + chunked.ManifestKey("db", manifest), "", 403, ""},
		{"GET", prefix + "secret", "", 403, ""},
		{"GET", prefix + "packs/../secret", "", 403, ""},
		{"GET", "/" + gatewayBucket + "/0000/" + chunked.PackKey(pack), "", 403, ""},
		{"GET", "/" + chunked.PackKey(pack), "", 403, ""},
	} {
		w := ask(c.method, c.path, c.span)
		if w.Code != c.status || c.status < 300 && w.Body.String() != c.want {
			t.Errorf("%s %s %s: %d %q, want %d %q", c.method, c.path, c.span, w.Code, w.Body, c.status, c.want)
		}
	}
}

// FuzzRange reads any text as a range: what comes out is one.
func FuzzRange(f *testing.F) {
	for _, s := range []string{"bytes=0-0", "bytes=5-9", "bytes=9-5", "bytes=-5", "bytes=9223372036854775807-9223372036854775807", "bytes=0-9223372036854775807"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		off, n, err := parseRange(s)
		if err == nil && (off < 0 || n <= 0 || off+n < 0) {
			t.Errorf("%q is %d from %d", s, n, off)
		}
	})
}
