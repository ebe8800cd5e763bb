package catalog

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/catalog/stored"
)

var stampTime = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// objectOf is an object with a head, and one member.
func objectOf(t testing.TB, head []byte) []byte {
	t.Helper()
	members := []stored.Member{{Name: "m", SHA256: digestOf("")}}
	if _, err := stored.Lay(members, stampTime); err != nil {
		t.Fatal(err)
	}
	r, err := stored.NewReader(t.Context(), head, members, stampTime, func(context.Context, stored.Member) (io.ReadCloser, error) {
		return io.NopCloser(strings.NewReader("")), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestUnverifiedHeads: of a head that nobody trusted has signed nothing is read, and
// what it says of itself changes nothing.
func TestUnverifiedHeads(t *testing.T) {
	s := newStoring(t)
	stranger := testSigner(t)
	members := []stored.Member{{Name: "m", SHA256: digestOf("")}}
	if _, err := stored.Lay(members, stampTime); err != nil {
		t.Fatal(err)
	}
	d := &storedDoc{formatStored, version, "test-1", stampTime, storedRecord(s.image, alice), members}
	good, err := encodeJSON(d)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := chunked.Sign(t.Context(), good, Namespace, stranger)
	if err != nil {
		t.Fatal(err)
	}
	// Nobody signed it; and reading it would be found out by its being no document.
	huge := []byte(`{"format":"instar-stored-image","version":1,"region":"test-1","members":[{}` + strings.Repeat(",{}", 1000) + "]}\n")
	hugeTheirs, err := chunked.Sign(t.Context(), huge, Namespace, stranger)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		head []byte
		want error
	}{
		{"a stranger's head", theirs, keys.ErrUntrusted},
		{"a head without a signature", good, keys.ErrSignature},
		{"a document that is none, without a signature", huge, keys.ErrSignature},
		{"a document that is none, of a stranger", hugeTheirs, keys.ErrUntrusted},
		{"a region that is none", bytes.Replace(theirs, []byte("test-1"), []byte("te_t-1"), 1), ErrFormat},
		{"a later version", bytes.Replace(theirs, []byte(`"version":1`), []byte(`"version":2`), 1), ErrVersion},
		{"something else", []byte("my diary"), ErrFormat},
	} {
		object := objectOf(t, c.head)
		s.buckets.set("bad.bin", object)
		_, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: "bad.bin", Name: "bad"})
		code(t, err, CodeParameterValue)
		if !errors.Is(err, c.want) || c.want != ErrFormat && errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		// Nor is it replaced, as it is not known to be the image.
		s.buckets.set(s.image.ID+".bin", object)
		_, err = s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
		code(t, err, CodeParameterValue)
		if got := s.buckets.snapshot()[s.image.ID+".bin"].data; !bytes.Equal(got, object) {
			t.Errorf("%s: it was replaced", c.name)
		}
	}
	// What is the image by a signature that is believed is replaced.
	mine, err := chunked.Sign(t.Context(), good, Namespace, s.key.opt.Signer)
	if err != nil {
		t.Fatal(err)
	}
	s.buckets.set(s.image.ID+".bin", objectOf(t, mine))
	s.put(t)
}

// TestInterposedHead: an object that comes to lie where a task is to put the image's
// ends the task, whatever it is.
func TestInterposedHead(t *testing.T) {
	s := newStoring(t)
	task, err := s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	if err != nil {
		t.Fatal(err)
	}
	object := objectOf(t, []byte(`{"format":"instar-stored-image","version":1,"region":"test-1","members":[{}`+strings.Repeat(",{}", 1000)+"]}\n"))
	s.buckets.set(task.Key, object)
	_, err = s.c.CompleteStore(t.Context(), "test", task, nil)
	code(t, err, CodeParameterValue)
	if got := s.buckets.snapshot()[task.Key].data; !bytes.Equal(got, object) {
		t.Error("it was replaced")
	}
}

// TestMembersAreCounted: more members than there may be are not read to their end.
func TestMembersAreCounted(t *testing.T) {
	for n, want := range map[int]bool{2: true, stored.MaxMembers + 1: false} {
		var l storedMembers
		err := l.UnmarshalJSON([]byte("[{}" + strings.Repeat(",{}", n-1) + "]"))
		if (err == nil) != want || len(l) > stored.MaxMembers {
			t.Errorf("%d members: %d were read, %v", n, len(l), err)
		}
	}
	for _, b := range []string{"", "null", "{}", "1", "[1]", "[{},"} {
		var l storedMembers
		if err := l.UnmarshalJSON([]byte(b)); err == nil {
			t.Errorf("%q was read: %v", b, l)
		}
	}
}

// TestInstarIsFoundByItsDigest: an Instar image's record says one location.
func TestInstarIsFoundByItsDigest(t *testing.T) {
	s := newStoring(t)
	name := digestOf("manifest")
	for location, want := range map[string]bool{
		"web@" + name: true, "web": false, "web@" + digestOf("other"): false, "@" + name: false, "alice/web@" + name: false, "instar:web@" + name: false,
	} {
		m := storedRecord(s.image, alice)
		m.Kind, m.Digest, m.Location = KindInstar, name, location
		d := &storedDoc{formatStored, version, "test-1", stampTime, m, []stored.Member{{Name: "m", SHA256: digestOf("")}}}
		if err := d.check(); (err == nil) != want {
			t.Errorf("%s: %v", location, err)
		}
	}
}

// TestRestoreAsks: whoever restores an Instar image must be allowed to have its
// location, which is no other than before; a bundle gets its own.
func TestRestoreAsks(t *testing.T) {
	s := newStoring(t)
	m := storedRecord(s.image, alice)
	m.Kind, m.Digest = KindInstar, digestOf("manifest")
	m.Location = "web@" + m.Digest
	members := []stored.Member{{Name: "m", SHA256: digestOf("")}}
	if _, err := stored.Lay(members, stampTime); err != nil {
		t.Fatal(err)
	}
	head, err := s.key.signStored(t.Context(), m, alice, "test-1", stampTime, members)
	if err != nil {
		t.Fatal(err)
	}
	s.buckets.set("web.bin", objectOf(t, head))
	s.put(t)
	var asked []string
	refused := errors.New("not yours")
	check := func(answer error) func(context.Context, string) error {
		return func(_ context.Context, location string) error {
			asked = append(asked, location)
			return answer
		}
	}
	if _, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: "web.bin", Name: "a web", Token: "t", Check: check(refused)}); !errors.Is(err, refused) {
		t.Errorf("refused: %v", err)
	}
	first, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: "web.bin", Name: "a web", Token: "t", Check: check(nil)})
	if err != nil || first.Location != m.Location {
		t.Fatalf("%+v, %v", first, err)
	}
	again, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: "web.bin", Name: "a web", Token: "t"})
	if err != nil || again.ID != first.ID {
		t.Errorf("the same request: %+v, %v", again, err)
	}
	if _, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: s.image.ID + ".bin", Name: "a bundle", Check: check(refused)}); err != nil {
		t.Errorf("a bundle: %v", err)
	}
	if len(asked) != 2 || asked[0] != m.Location || asked[1] != m.Location {
		t.Errorf("asked of %q", asked)
	}
	// An object that says another location by now is not what was asked for.
	m.Location = "mail@" + m.Digest
	if head, err = s.key.signStored(t.Context(), m, alice, "test-1", stampTime, members); err != nil {
		t.Fatal(err)
	}
	s.buckets.set("web.bin", objectOf(t, head))
	_, err = s.c.CompleteRestore(t.Context(), asAlice, "test", first.ID, nil)
	code(t, err, CodeManifest)
}

// FuzzStoredHead: nothing that is not signed is opened, and the region that is taken
// from the first bytes is the document's.
func FuzzStoredHead(f *testing.F) {
	f.Add([]byte(`{"format":"instar-stored-image","version":1,"region":"a","created":"2026-11-22T05:00:00Z","image":null,"members":[{"name":"m","offset":1,"size":2,"sha1":"x"}]}` + "\n"))
	f.Add([]byte(`{"format":"instar-stored-image","version":1,"region":"a`))
	f.Add([]byte(`{"format":"instar-stored-image","version":9,"region":"a"`))
	trust := trustIn(testSigner(f).Public())
	f.Fuzz(func(t *testing.T, b []byte) {
		if d, err := openStored(b, trust); err == nil {
			t.Fatalf("%q is opened: %+v", b, d)
		}
		region, err := storedRegion(b)
		d := &storedDoc{}
		if decodeJSON(formatStored, b, stored.MaxHead, d, func() (string, int) { return d.Format, d.Version }) == nil &&
			CheckRegion(d.Region) == nil && (err != nil || d.Region != region) {
			t.Fatalf("%q is of region %q, by its first bytes %q, %v", b, d.Region, region, err)
		}
	})
}
