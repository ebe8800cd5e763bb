package ticket

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode"

	"filippo.io/age"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a metadata server that says what a test wants it to.
type fake struct {
	token  string
	answer func(w http.ResponseWriter, r *http.Request, to age.Recipient)
	asked  []string
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.asked = append(f.asked, r.Method+" "+r.URL.Path+" "+r.Header.Get("X-aws-ec2-metadata-token"))
	if r.Method == http.MethodPut {
		if ttl := r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds"); ttl != "21600" {
			http.Error(w, "ttl "+ttl, http.StatusBadRequest)
			return
		}
		io.WriteString(w, f.token)
		return
	}
	var q Request
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil || q.Version != Version {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	to, err := age.ParseX25519Recipient(q.Recipient)
	if err != nil {
		http.Error(w, "bad recipient", http.StatusBadRequest)
		return
	}
	f.answer(w, r, to)
}

func seal(t testing.TB, plain string, to age.Recipient) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to)
	if err == nil {
		_, err = io.WriteString(w, plain)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newClient(t *testing.T, f *fake) *Client {
	t.Helper()
	if f.token == "" {
		f.token = "a-token"
	}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	c, err := New(srv.URL+"/", Options{AnyPort: true, Timeout: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const good = `{"version":1,"instance-id":"i-1","format":"instar","mode":"lazy","store":"s3://b/p","manifest":"m","manifest-sha256":"ab","index-key":"AGE-SECRET","future":[1,2],"expires":"2030-01-01T00:00:00Z"}`

func TestClaim(t *testing.T) {
	f := new(fake)
	f.answer = func(w http.ResponseWriter, r *http.Request, to age.Recipient) {
		if strings.HasSuffix(r.URL.Path, "/complete") {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.Write(seal(t, good, to))
	}
	c := newClient(t, f)
	for range 2 { // a claim, and a renewal with the same token and recipient
		got, err := c.Claim(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := &Ticket{Version: 1, InstanceID: "i-1", Format: "instar", Mode: Lazy, Store: "s3://b/p", Manifest: "m", ManifestSHA256: "ab", IndexKey: "AGE-SECRET", Expires: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			if s := fmt.Sprintf(verb, got); strings.Contains(s, "SECRET") || !strings.Contains(s, "i-1") {
				t.Errorf("%s prints %s", verb, s)
			}
		}
	}
	if err := c.Complete(t.Context()); err != nil {
		t.Error(err)
	}
	want := []string{"PUT /latest/api/token ", "POST /latest/api/instar/launch a-token", "POST /latest/api/instar/launch a-token", "POST /latest/api/instar/launch/complete a-token"}
	if d := cmp.Diff(want, f.asked); d != "" {
		t.Error(d)
	}
}

// TestNewToken asks for another token once, when the one it has is refused.
func TestNewToken(t *testing.T) {
	f := new(fake)
	refusals := 1
	f.answer = func(w http.ResponseWriter, _ *http.Request, to age.Recipient) {
		if refusals--; refusals >= 0 {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Write(seal(t, good, to))
	}
	c := newClient(t, f)
	if _, err := c.Claim(t.Context()); err != nil {
		t.Error(err)
	}
	if len(f.asked) != 4 {
		t.Errorf("asked %q", f.asked)
	}
	refusals, f.asked = 1000, nil
	_, err := c.Claim(t.Context())
	var refused *StatusError
	if !errors.As(err, &refused) || refused.Status != 401 || len(f.asked) != 3 {
		t.Errorf("%v after %q", err, f.asked)
	}
}

// TestHostileServer has answers of all kinds that are no ticket: each is an
// error that says why, in one printable line, with no secret in it.
func TestHostileServer(t *testing.T) {
	stranger, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	type answer = func(w http.ResponseWriter, r *http.Request, to age.Recipient)
	text := func(status int, ctype, body string) answer {
		return func(w http.ResponseWriter, _ *http.Request, _ age.Recipient) {
			w.Header().Set("Content-Type", ctype)
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	sealed := func(plain string) answer {
		return func(w http.ResponseWriter, _ *http.Request, to age.Recipient) { w.Write(seal(t, plain, to)) }
	}
	for _, c := range []struct {
		name, token, want string
		answer            answer
	}{
		{"refused", "", "answered 403: no launch for you", text(403, "text/plain", "no launch for you\nsecond line")},
		{"refused with a page", "", "answered 404: Not Found", text(404, "text/html", "<html>")},
		{"refused at length", "", "answered 410: " + strings.Repeat("x", 300), text(410, "text/plain", strings.Repeat("x", 1<<20))},
		{"refused with escapes", "", "answered 409: ?[2Jx??y", text(409, "text/plain; charset=x", "\x1b[2Jx\u009b\xffy")},
		{"sent elsewhere", "", "answered 302", func(w http.ResponseWriter, r *http.Request, _ age.Recipient) {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		}},
		{"empty", "", "opening the launch ticket", text(200, "application/octet-stream", "")},
		{"not sealed", "", "opening the launch ticket", text(200, "application/octet-stream", good)},
		{"sealed to somebody else", "", "opening the launch ticket", func(w http.ResponseWriter, _ *http.Request, _ age.Recipient) {
			w.Write(seal(t, good, stranger.Recipient()))
		}},
		{"sealed with a passphrase too", "", "opening the launch ticket", text(200, "", "age-encryption.org/v1\n-> scrypt AAAA 22\nAAAA\n---\n")},
		{"cut off", "", "opening the launch ticket", func(w http.ResponseWriter, _ *http.Request, to age.Recipient) {
			b := seal(t, good, to)
			w.Write(b[:len(b)-1])
		}},
		{"changed", "", "opening the launch ticket", func(w http.ResponseWriter, _ *http.Request, to age.Recipient) {
			b := seal(t, good, to)
			b[len(b)-20] ^= 1
			w.Write(b)
		}},
		{"broken off", "", "unexpected EOF", func(w http.ResponseWriter, _ *http.Request, to age.Recipient) {
			w.Header().Set("Content-Length", "100000")
			w.Write(seal(t, good, to))
		}},
		{"without end", "", "more than 16777216 bytes", func(w http.ResponseWriter, _ *http.Request, _ age.Recipient) {
			for chunk := make([]byte, 1<<20); ; {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}},
		{"headers without end", "", "exceeded", func(w http.ResponseWriter, _ *http.Request, _ age.Recipient) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
		}},
		{"no JSON", "", "reading the launch ticket", sealed("nonsense")},
		{"a list", "", "reading the launch ticket", sealed("[]")},
		{"two", "", "reading the launch ticket", sealed(good + good)},
		{"no version", "", "it has version 0, this program knows 1", sealed("{}")},
		{"another version", "", "it has version 2, this program knows 1", sealed(`{"version":2,"store":["in","another","form"]}`)},
		{"members of wrong kinds", "", "reading the launch ticket", sealed(`{"version":1,"store":{}}`)},
		{"another mode", "", "its mode: \"sideways\" is none of eager, lazy, lazy-or-eager", sealed(`{"version":1,"mode":"sideways"}`)},
		{"another manifest", "", "not the one whose digest", sealed(`{"version":1,"manifest-bytes":"AAAA","manifest-sha256":"00"}`)},
		{"deep", "", "reading the launch ticket", sealed(`{"version":1,"x":` + strings.Repeat("[", 1<<20) + `}`)},
		{"a token with a line break", "a\r\nX: y", "no token", sealed(good)},
		{"a token of a megabyte", strings.Repeat("x", 1<<20), "no token", sealed(good)},
	} {
		cl := newClient(t, &fake{token: c.token, answer: c.answer})
		got, err := cl.Claim(t.Context())
		if err == nil || got != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
			continue
		}
		if s := err.Error(); len(s) > 1000 || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) || strings.Contains(s, "AGE-SECRET") {
			t.Errorf("%s: the error is %.1000q", c.name, s)
		}
	}
}

// TestSilentServer never answers: the client gives up by itself.
func TestSilentServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := New("http://"+ln.Addr().String(), Options{AnyPort: true, Timeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Claim(t.Context()); err == nil || !strings.Contains(err.Error(), "claiming the launch ticket") {
		t.Errorf("got %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Complete(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestPort asks from a port that only root has.
func TestPort(t *testing.T) {
	ports := make(chan string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, port, _ := net.SplitHostPort(r.RemoteAddr)
		ports <- port
		w.WriteHeader(http.StatusForbidden)
	}))
	defer srv.Close()
	c, err := New(srv.URL, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Claim(t.Context()); err == nil {
		t.Error("a refusal is no error")
	}
	var port int
	if _, err := fmt.Sscan(<-ports, &port); err != nil || port < 512 || port > 1023 {
		t.Errorf("port %d, %v", port, err)
	}
}

func FuzzTicket(f *testing.F) {
	f.Add([]byte(good))
	f.Add([]byte(`{"version":1,"manifest-bytes":"AAAA","manifest-sha256":"709e80c88487a2411e1ee4dfb9f22a861492d20c4765150c0c794abd70f8147c","objects":{"a":"b"},"credentials":{}}`))
	f.Add([]byte(`{"version":1,"Version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parse(b)
		if err != nil {
			return
		}
		if got.Version != Version {
			t.Fatalf("version %d was taken", got.Version)
		}
		text, err := json.Marshal(got)
		if err != nil {
			return // a year that JSON's times do not have
		}
		again, err := parse(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if d := cmp.Diff(got, again); d != "" {
			t.Fatalf("not the same when read again: %s", d)
		}
	})
}
