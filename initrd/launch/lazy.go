package launch

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
	"github.com/instar-image/instar/upload"
)

// Image is an Instar image that the machine fetches itself, by a ticket: what
// it needs of it, while it runs.
type Image struct {
	// Objects is the store that the image is in. The machine reads it through
	// this process, and has no credentials.
	Objects  upload.Store
	Name     string       // of the image
	Manifest chunked.Name // of its manifest
	Root     chunked.Name // of its index
	Key      chunked.Key  // that opens the index
	Signers  string       // allowed_signers: whose word the machine believes
	Mode     ticket.Mode
	Cache    string // URL of a cache, as the machine sees it; "": none
}

// gateway gives a machine its ticket and the image's objects.
type gateway struct {
	image  *Image
	secret string // in the objects' path: nobody else is given any
	object []byte // the image's keys, for the machine's identity alone
	opens  string // that identity
	base   string // URL of the gateway in the machine
}

// gatewayBucket is the bucket that the machine takes the gateway for.
const gatewayBucket = "launch"

// newGateway prepares an image for a machine that reaches l at guestHost.
func newGateway(i *Image, l net.Listener) (*gateway, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, err
	}
	to, err := keys.ParseRecipient(id.Recipient().String())
	if err != nil {
		return nil, err
	}
	wrapped, err := chunked.WrapIndexKey(i.Root, i.Key, to, "launch")
	if err != nil {
		return nil, fmt.Errorf("giving the machine the image's key: %w", err)
	}
	object, err := (&chunked.KeysObject{Recipients: []chunked.Wrapped{wrapped}}).Document()
	if err != nil {
		return nil, fmt.Errorf("giving the machine the image's key: %w", err)
	}
	secret := make([]byte, 16)
	rand.Read(secret)
	return &gateway{
		image: i, secret: hex.EncodeToString(secret), object: object, opens: id.String(),
		base: fmt.Sprintf("http://%s:%d", guestHost, l.Addr().(*net.TCPAddr).Port),
	}, nil
}

// Claim gives the ticket to whoever asks through the machine's metadata.
func (g *gateway) Claim(_ context.Context, in *metadata.Instance, body []byte) ([]byte, error) {
	_, to, err := ticket.ParseRequest(body)
	if err != nil {
		return nil, &metadata.Refusal{Status: http.StatusBadRequest, Reason: err.Error()}
	}
	expires := time.Now().Add(365 * 24 * time.Hour).UTC().Truncate(time.Second)
	t := &ticket.Ticket{
		Version: ticket.Version, InstanceID: in.ID, Format: "instar", Mode: g.image.Mode, Cache: g.image.Cache,
		Store: "s3://" + gatewayBucket + "/" + g.secret, Endpoint: g.base,
		Manifest: chunked.ManifestKey(g.image.Name, g.image.Manifest), ManifestSHA256: g.image.Manifest.String(),
		Signers: g.image.Signers, IndexKey: g.opens, Expires: expires,
		// It is the path that the gateway looks at.
		Credentials: &ticket.Credentials{AccessKeyID: gatewayBucket, SecretAccessKey: gatewayBucket, Expiration: expires},
	}
	return t.Seal(to)
}

// Complete has nothing to withdraw: the gateway ends with the machine.
func (g *gateway) Complete(context.Context, *metadata.Instance, []byte) error { return nil }

// key is the object that a path names, of those that the image may be made of.
func (g *gateway) key(path string) (string, bool) {
	rest, ok := strings.CutPrefix(path, "/"+gatewayBucket+"/")
	secret, key, cut := strings.Cut(rest, "/")
	if !ok || !cut || subtle.ConstantTimeCompare([]byte(secret), []byte(g.secret)) != 1 {
		return "", false
	}
	own := key == chunked.ManifestKey(g.image.Name, g.image.Manifest) || key == chunked.KeysKey(g.image.Name, g.image.Manifest) ||
		key == chunked.TraceKey(g.image.Name, g.image.Manifest)
	for _, folder := range []string{"packs/", "index/", "moved/"} {
		own = own || strings.HasPrefix(key, folder)
	}
	return key, own && !strings.Contains(key, "..")
}

// ServeHTTP gives an object, or a range of it.
func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key, ok := g.key(r.URL.Path)
	if !ok || r.Method != http.MethodGet {
		http.Error(w, "none of the image's", http.StatusForbidden)
		return
	}
	if key == chunked.KeysKey(g.image.Name, g.image.Manifest) {
		w.Write(g.object)
		return
	}
	var o upload.GetOptions
	status := http.StatusOK
	if span := r.Header.Get("Range"); span != "" {
		off, n, err := parseRange(span)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		o.Offset, o.Length, status = off, n, http.StatusPartialContent
	}
	body, object, err := g.image.Objects.Get(r.Context(), key, o)
	switch {
	case errors.Is(err, upload.ErrNotExist):
		http.Error(w, "not there", http.StatusNotFound)
		return
	case err != nil:
		http.Error(w, "the store does not give it", http.StatusServiceUnavailable)
		return
	}
	defer body.Close()
	n := object.Size
	if status == http.StatusPartialContent {
		n = min(o.Length, object.Size-o.Offset)
	}
	if n < 0 {
		http.Error(w, "behind its end", http.StatusRequestedRangeNotSatisfiable)
		return
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	w.WriteHeader(status)
	io.Copy(w, body) // what is cut short is asked for again
}

// parseRange reads the one form of ranges that the initrd uses.
func parseRange(s string) (off, n int64, err error) {
	var last int64
	if k, err := fmt.Sscanf(s, "bytes=%d-%d", &off, &last); k != 2 || err != nil || off < 0 || last < off || last > 1<<50 {
		return 0, 0, fmt.Errorf("range %q is not bytes=FIRST-LAST", s)
	}
	return off, last - off + 1, nil
}
