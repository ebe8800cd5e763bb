package launch

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/instar-image/instar/bundle/ec2"
	"github.com/instar-image/instar/metadata"
	"github.com/instar-image/instar/metadata/ticket"
)

// TestLife is a ticket from its claim to its end.
func TestLife(t *testing.T) {
	w := newWorld(t)
	c := w.client(t, ticket.Options{})
	got, err := c.Claim(ctx)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(w.store, w.manifestFile))
	if err != nil {
		t.Fatal(err)
	}
	if got.InstanceID != "i-1" || got.Format != "ec2" || got.Key != hex.EncodeToString(w.key[:]) || got.IV != hex.EncodeToString(w.iv[:]) ||
		!bytes.Equal(got.ManifestBytes, text) || got.ManifestSHA256 != fmt.Sprintf("%x", sha256.Sum256(text)) || got.Certificate != w.user.pem || got.Credentials != nil {
		t.Errorf("the ticket is %+v", *got)
	}
	if len(got.Objects) != 1+len(w.manifest.Parts) || got.Objects[w.manifest.Parts[0].Filename] != "https://store.example/web.part.0?valid=1h0m0s" || time.Until(got.Expires) < 59*time.Minute {
		t.Errorf("the ticket's objects are %v until %v", got.Objects, got.Expires)
	}
	if s := fmt.Sprintf("%v %+v %#v", got, got, got); strings.Contains(s, got.Key) {
		t.Errorf("printing a ticket shows its key: %s", s)
	}
	if _, err := c.Claim(ctx); err != nil {
		t.Errorf("renewal: %v", err)
	}
	second := w.client(t, ticket.Options{})
	if _, err := second.Claim(ctx); err != nil {
		t.Errorf("a second claim: %v", err)
	}
	if err := c.Complete(ctx); err == nil {
		t.Error("who lost the ticket completed it")
	}
	w.refused(t, "completion by who lost it", c.Complete(ctx), 409, "only who holds")
	if _, err := w.client(t, ticket.Options{}).Claim(ctx); err != nil {
		t.Errorf("a third claim: %v", err)
	}
	_, err = w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "a fourth claim", err, 403, "too often (3 times)")
	last := w.client(t, ticket.Options{})
	if err := w.state.Update(ctx, "i-1", func(l *metadata.Live) error { l.Ticket = metadata.TicketState{}; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := last.Claim(ctx); err != nil {
		t.Errorf("after an operator renewed it: %v", err)
	}
	heir := w.client(t, ticket.Options{Holder: last.Holder()}) // another process, of the same boot
	for _, c := range []*ticket.Client{heir, last} {
		if err := c.Complete(ctx); err != nil {
			t.Errorf("completion: %v", err)
		}
	}
	_, err = last.Claim(ctx)
	w.refused(t, "a claim after completion", err, 410, "completed or withdrawn")
	_, err = w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "another's claim after completion", err, 410, "completed or withdrawn")

	w.instance.LaunchTime = time.Now() // launched anew
	w.serve(t, metadata.Options{})
	if _, err := w.client(t, ticket.Options{}).Claim(ctx); err != nil {
		t.Errorf("a new launch: %v", err)
	}
	want := []string{
		"200 launch: claimed", "200 launch: renewed (1)", "200 launch: claimed again (2)", "409 launch: only", "409 launch: only",
		"200 launch: claimed again (3)", "403 launch: the ticket was claimed too often", "200 launch: claimed", "204 launch: completed", "204 launch: completed already", "410", "410", "200 launch: claimed",
	}
	if len(w.notes) != len(want) {
		t.Fatalf("the log has %q", w.notes)
	}
	for i := range want {
		if !strings.Contains(w.notes[i], want[i]) {
			t.Errorf("log line %d is %q, want %q", i, w.notes[i], want[i])
		}
	}
}

// TestWithdrawn is a ticket that an operator ended before anybody had it.
func TestWithdrawn(t *testing.T) {
	w := newWorld(t)
	withdraw := func(l *metadata.Live) error {
		l.Ticket = metadata.TicketState{Launch: w.instance.LaunchID(), Completed: true}
		return nil
	}
	if err := w.state.Update(ctx, "i-1", withdraw); err != nil {
		t.Fatal(err)
	}
	_, err := w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "a withdrawn ticket", err, 410, "withdrawn")
}

// TestAsking is who may ask, and how.
func TestAsking(t *testing.T) {
	w := newWorld(t)
	_, err := w.client(t, ticket.Options{AnyPort: true}).Claim(ctx)
	w.refused(t, "a port of a user's", err, 403, "source port is not below 1024")

	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	pq, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	good := fmt.Sprintf(`{"version":1,"recipient":"%s"}`, id.Recipient())
	// dial comes from an address and the first port of a range that is free.
	send := func(from, method, path, token, body string, headers ...string) (int, []byte) {
		t.Helper()
		tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			for port := 511; port > 256; port-- {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from), Port: port}}
				if c, err = d.DialContext(ctx, network, addr); err == nil {
					return c, nil
				}
			}
			return nil, err
		}}
		req, err := http.NewRequest(method, w.base+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("X-aws-ec2-metadata-token", token)
		}
		for i := 0; i+1 < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		res, err := (&http.Client{Transport: tr}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, b
	}
	tokenOf := func(from string) string {
		_, b := send(from, "PUT", "/latest/api/token", "", "", "X-aws-ec2-metadata-token-ttl-seconds", "60")
		return string(b)
	}
	tok, other := tokenOf("127.0.0.1"), tokenOf("127.0.0.2")
	const path = "/latest/api/instar/launch"
	logged := map[string]string{ // what the log says of it
		"no token": "i-1 401 token missing", "wrong token": "i-1 401 token wrong, expired or another instance's",
		"another's token": "i-1 401 token wrong, expired or another instance's", "another with this one's token": "i-2 401 token wrong",
		"a stranger": " 404 no instance has this caller", "through a proxy": "i-1 403 launch: asked for through a proxy",
		"no body": "launch: the body is not a ticket request", "much": "launch: body missing, broken off or over 4096 bytes",
		"a manifest of its own choice": "launch: the body is not a ticket request", "no recipient": "launch: the recipient is not an age recipient",
		"another version of requests": "launch: version 2 of ticket requests is not known", "completion before a claim": "launch: only who holds the ticket",
		"a good claim": "i-1 200 launch: claimed", "a post-quantum recipient": "i-1 200 launch: claimed again (2)",
	}
	for _, c := range []struct {
		name, from, method, path, token, body string
		headers                               []string
		status                                int
	}{
		{"no token", "127.0.0.1", "POST", path, "", good, nil, 401},
		{"wrong token", "127.0.0.1", "POST", path, "x", good, nil, 401},
		{"another's token", "127.0.0.1", "POST", path, other, good, nil, 401},
		{"another with this one's token", "127.0.0.2", "POST", path, tok, good, nil, 401},
		{"an instance without a launch", "127.0.0.2", "POST", path, other, good, nil, 404},
		{"completion without a launch", "127.0.0.2", "POST", path + "/complete", other, good, nil, 404},
		{"a stranger", "127.0.0.3", "POST", path, tok, good, nil, 404},
		{"through a proxy", "127.0.0.1", "POST", path, tok, good, []string{"X-Forwarded-For", "127.0.0.1"}, 403},
		{"GET", "127.0.0.1", "GET", path, tok, "", nil, 405},
		{"PUT", "127.0.0.1", "PUT", path, tok, good, nil, 405},
		{"elsewhere", "127.0.0.1", "POST", path + "/other", tok, good, nil, 404},
		{"deeper", "127.0.0.1", "POST", path + "/complete/x", tok, good, nil, 404},
		{"above", "127.0.0.1", "POST", "/latest/api/instar", tok, good, nil, 404},
		{"another version", "127.0.0.1", "POST", "/2009-04-04/api/instar/launch", tok, good, nil, 405},
		{"no body", "127.0.0.1", "POST", path, tok, "", nil, 400},
		{"nonsense", "127.0.0.1", "POST", path, tok, "nonsense", nil, 400},
		{"much", "127.0.0.1", "POST", path, tok, good + strings.Repeat(" ", 4096), nil, 400},
		{"two", "127.0.0.1", "POST", path, tok, good + good, nil, 400},
		{"a manifest of its own choice", "127.0.0.1", "POST", path, tok, strings.Replace(good, "{", `{"manifest":"other.manifest.xml",`, 1), nil, 400},
		{"another version of requests", "127.0.0.1", "POST", path, tok, strings.Replace(good, ":1,", ":2,", 1), nil, 400},
		{"no recipient", "127.0.0.1", "POST", path, tok, `{"version":1,"recipient":""}`, nil, 400},
		{"an SSH recipient", "127.0.0.1", "POST", path, tok, `{"version":1,"recipient":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEX0n5xXGLzC5c5hTLsRzAbY2TrFwgsFUZzn2kP4yZcA"}`, nil, 400},
		{"completion before a claim", "127.0.0.1", "POST", path + "/complete", tok, good, nil, 409},
		{"a good claim", "127.0.0.1", "POST", path + "/", tok, good, nil, 200},
		{"a post-quantum recipient", "127.0.0.1", "POST", "//latest//api/instar/launch", tok, fmt.Sprintf(`{"version":1,"recipient":"%s"}`, pq.Recipient()), nil, 200},
	} {
		before := len(w.notes)
		status, b := send(c.from, c.method, c.path, c.token, c.body, c.headers...)
		if status != c.status {
			t.Errorf("%s: %d %s, want %d", c.name, status, b, c.status)
		}
		if len(w.notes) != before+1 {
			t.Errorf("%s: %d log lines", c.name, len(w.notes)-before)
		} else if last := w.notes[before]; !strings.Contains(last, fmt.Sprintf(" %d ", c.status)) || !strings.Contains(last, logged[c.name]) {
			t.Errorf("%s: the log has %q, want %q in it", c.name, last, logged[c.name])
		}
		if bytes.Contains(b, []byte(hex.EncodeToString(w.key[:]))) {
			t.Errorf("%s: the answer is not sealed", c.name)
		}
		if c.status == 200 {
			if _, err := age.Decrypt(bytes.NewReader(b), pick(strings.HasPrefix(c.path, "//"), pq, id)); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
	}
	if status, b := send("127.0.0.1", "GET", "/latest/", tok, ""); status != 200 || strings.Contains(string(b), "api") {
		t.Errorf("the endpoint is listed: %s", b)
	}

	// A server that was started anew has other token keys: the client asks again.
	c := w.client(t, ticket.Options{})
	if _, err := c.Claim(ctx); err != nil {
		t.Fatal(err)
	}
	if err := w.state.Update(ctx, "i-1", func(l *metadata.Live) error { l.Generation++; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Claim(ctx); err != nil {
		t.Errorf("after tokens were revoked: %v", err)
	}

	w.serve(t, metadata.Options{AnyPort: true})
	if err := w.state.Update(ctx, "i-1", func(l *metadata.Live) error { l.Ticket = metadata.TicketState{}; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := w.client(t, ticket.Options{AnyPort: true}).Claim(ctx); err != nil {
		t.Errorf("any port at a private server: %v", err)
	}
}

func pick(first bool, a, b age.Identity) age.Identity {
	if first {
		return a
	}
	return b
}

// TestNoOracle tries to have keys opened that are not this launch's.
func TestNoOracle(t *testing.T) {
	w := newWorld(t)
	original, err := os.ReadFile(filepath.Join(w.store, w.manifestFile))
	if err != nil {
		t.Fatal(err)
	}
	claim := func() error {
		_, err := w.client(t, ticket.Options{}).Claim(ctx)
		return err
	}
	thief := newPair(t)

	// Somebody who may write the store signs the encrypted key anew.
	_, copied, err := ec2.Migrate(w.manifest, ec2.MigrateOptions{Trust: []*rsa.PublicKey{&w.user.key.PublicKey}, Key: thief.key, KeepIDs: true})
	if err != nil {
		t.Fatal(err)
	}
	w.put(t, copied)
	w.refused(t, "a copied key, signed by somebody else", claim(), 403, "is not for this launch")

	i, j := bytes.Index(copied, []byte("<signature>")), bytes.Index(copied, []byte("</signature>"))
	unsigned := bytes.Join([][]byte{copied[:i], []byte("<signature>UNSIGNED"), copied[j:]}, nil)
	w.put(t, unsigned)
	w.refused(t, "an unsigned manifest", claim(), 403, "manifest")

	w.put(t, bytes.Replace(original, []byte("x86_64"), []byte("x86_65"), 1))
	w.refused(t, "a changed manifest", claim(), 403, "is not for this launch")

	// The manifest of another bundle of the same user's, in another's record.
	w.put(t, original)
	w.instance.Launch.ManifestSHA256 = strings.Repeat("0", 64)
	w.serve(t, metadata.Options{})
	w.refused(t, "a manifest other than the record's", claim(), 403, "is not the record's")
	w.instance.Launch.ManifestSHA256 = ""

	// The record trusts the thief, but the key is wrapped for another cloud.
	other := newPair(t)
	_, foreign, err := ec2.Bundle(ctx, ec2.BundleOptions{Arch: "x86_64", Account: "1", EC2Cert: other.cert, UserCert: w.user.cert, Key: w.user.key},
		ec2.Image{Name: "web", Size: 1, Write: func(_ context.Context, o io.Writer) error { _, err := o.Write([]byte{0}); return err }}, dirSink(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	w.put(t, foreign)
	w.serve(t, metadata.Options{})
	w.refused(t, "a key for another cloud", claim(), 403, "another cloud's key")

	w.put(t, []byte("<manifest>"))
	w.refused(t, "no manifest at all", claim(), 403, "is not valid")
	if err := os.Remove(filepath.Join(w.store, w.manifestFile)); err != nil {
		t.Fatal(err)
	}
	w.refused(t, "a manifest that is not there", claim(), 503, "reading the image's manifest")
	if n := w.state.Live("i-1").Ticket.Claims; n != 0 {
		t.Errorf("refused claims were counted: %d", n)
	}
	w.put(t, original)
	if err := claim(); err != nil {
		t.Errorf("the right manifest: %v", err)
	}
}

// TestOneAtATime claims while a claim is being answered.
func TestOneAtATime(t *testing.T) {
	w := newWorld(t)
	slow := slowState{w.state, make(chan struct{}, 1), make(chan struct{})}
	w.state = slow
	w.serve(t, metadata.Options{})
	first := make(chan error)
	go func() {
		_, err := w.client(t, ticket.Options{}).Claim(ctx)
		first <- err
	}()
	<-slow.asked
	_, err := w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "a claim beside another", err, 429, "another claim")
	close(slow.proceed)
	if err := <-first; err != nil {
		t.Errorf("the claim under way: %v", err)
	}
	if _, err := w.client(t, ticket.Options{}).Claim(ctx); err != nil {
		t.Errorf("a claim after it: %v", err)
	}
}

// slowState changes nothing until it is told to.
type slowState struct {
	metadata.State
	asked, proceed chan struct{}
}

func (s slowState) Update(ctx context.Context, id string, f func(*metadata.Live) error) error {
	select {
	case s.asked <- struct{}{}:
	default:
	}
	<-s.proceed
	return s.State.Update(ctx, id, f)
}

// TestStateFails gives no ticket that was not noted.
func TestStateFails(t *testing.T) {
	w := newWorld(t)
	w.state = failing{w.state}
	w.serve(t, metadata.Options{})
	_, err := w.client(t, ticket.Options{}).Claim(ctx)
	w.refused(t, "a state that cannot be kept", err, 503, "the disk is full")
}

type failing struct{ metadata.State }

func (failing) Update(context.Context, string, func(*metadata.Live) error) error {
	return errors.New("the disk is full")
}

func TestInstarFormat(t *testing.T) {
	w := newWorld(t)
	sum := strings.Repeat("ab", 32)
	w.instance.Launch = &metadata.Launch{Format: "instar", Store: "file://" + w.store, Manifest: "images/" + sum, Mode: "lazy", Cache: "http://10.0.2.2:9255", ManifestSHA256: sum, Signers: "me ssh-ed25519 AAAA", IndexKey: "AGE-SECRET-KEY-1X"}
	w.presign = false
	w.serve(t, metadata.Options{})
	got, err := w.client(t, ticket.Options{}).Claim(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if got.Format != "instar" || got.Mode != ticket.Lazy || got.Cache != "http://10.0.2.2:9255" || got.ManifestSHA256 != sum || got.Signers != "me ssh-ed25519 AAAA" || got.IndexKey != "AGE-SECRET-KEY-1X" || got.Key != "" || got.Objects != nil {
		t.Errorf("the ticket is %+v", *got)
	}
}
