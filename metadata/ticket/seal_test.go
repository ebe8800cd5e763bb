package ticket

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-cmp/cmp"
)

// TestSeal: whom a request names, of either kind, opens the answer, and it is
// the ticket.
func TestSeal(t *testing.T) {
	classic, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	hybrid, err := age.GenerateHybridIdentity()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id   age.Identity
		name string
	}{{classic, classic.Recipient().String()}, {hybrid, hybrid.Recipient().String()}} {
		body, err := json.Marshal(Request{Version, c.name})
		if err != nil {
			t.Fatal(err)
		}
		holder, to, err := ParseRequest(body)
		if err != nil || holder != c.name {
			t.Fatalf("%s: %q, %v", body, holder, err)
		}
		want := &Ticket{Version: Version, InstanceID: "i-1", Format: "ec2", Objects: map[string]string{"a": "http://b"}, Expires: time.Unix(1e9, 0).UTC()}
		sealed, err := want.Seal(to)
		if err != nil {
			t.Fatal(err)
		}
		r, err := age.Decrypt(bytes.NewReader(sealed), c.id)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parse(plain)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"recipient":"age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"}`))
	f.Add([]byte(`{"version":1,"recipient":"age1pq1","more":1}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		holder, to, err := ParseRequest(b)
		if err == nil && (holder == "" || to == nil) {
			t.Errorf("%q: nobody", b)
		}
	})
}
