package catalog

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
)

// FuzzPage: what is taken for a page is in its one form, and every entry is
// right.
func FuzzPage(f *testing.F) {
	m := &Image{ID: "ami-00000000000000001", Revision: 1, Name: "web-1", Owner: alice, State: Available, Created: time.Unix(1e9, 0).UTC(), Kind: KindNone, RootDeviceType: "ebs", Tags: Tags{"a": "b"}}
	m.defaults()
	p := &page{Salt: "00000000000000000000000000000000", Entries: []entry{{Key: imageKey(m.ID), Image: m}, {Key: nameKey(alice, "web-1"), Ref: m.ID}}}
	b, err := p.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"format":"instar-catalog-page","version":1,"salt":"","entries":null}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &page{}
		if json.Unmarshal(b, p) != nil || len(p.Entries) == 0 {
			return
		}
		ref := pageRef{First: p.Entries[0].Key, Name: chunked.NameOf(b), Size: int64(len(b)), Entries: len(p.Entries)}
		got, err := openPage(ref, "", b)
		if err != nil {
			return
		}
		again, err := got.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("%q is read as %q, %v", b, again, err)
		}
		for i := range got.Entries {
			if err := got.Entries[i].check(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzHead: heads and roots, without their signature.
func FuzzHead(f *testing.F) {
	f.Add([]byte(`{"format":"instar-catalog","version":1,"region":"a","sequence":1,"root":"0000000000000000000000000000000000000000000000000000000000000000","size":1,"created":"2026-11-22T05:00:00Z"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h := &head{}
		if decodeJSON(formatHead, b, maxHead, h, func() (string, int) { return h.Format, h.Version }) == nil && h.check() == nil {
			if again, err := encodeJSON(h); err != nil || !bytes.Equal(again, b) {
				t.Fatalf("%q is read as %q", b, again)
			}
		}
		h = &head{Region: "a", Sequence: 1, Root: chunked.NameOf(b), Size: int64(len(b))}
		_, _ = openRoot(h, b)
	})
}

// FuzzFilter: no pattern makes matching fail or slow.
func FuzzFilter(f *testing.F) {
	f.Add("a*b?c\\*", "aXbYc*")
	f.Add("****", "")
	f.Fuzz(func(t *testing.T, p, s string) {
		compiled := compile(p)
		got := compiled.match(s)
		if exact, ok := compiled.exact(); ok && bytes.Equal([]byte(exact), []byte(s)) && !got {
			t.Fatalf("%q does not match %q", p, s)
		}
	})
}

// FuzzPublicKey: what is taken is a key that is shown as it was meant.
func FuzzPublicKey(f *testing.F) {
	f.Add([]byte("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqIPd7b19kHzxcBjHGZw2E73YQM8XtzNK8VgrXRdpt2 laptop"))
	f.Add([]byte("---- BEGIN SSH2 PUBLIC KEY ----\nComment: x\nAAAA\n---- END SSH2 PUBLIC KEY ----"))
	f.Fuzz(func(t *testing.T, b []byte) {
		pub, err := ParsePublicKey(b)
		if err != nil {
			return
		}
		if again, err := ParsePublicKey([]byte(authorized(pub))); err != nil || !bytes.Equal(again.Marshal(), pub.Marshal()) {
			t.Fatalf("%q: %v", b, err)
		}
	})
}
