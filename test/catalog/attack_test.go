package catalog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/test/instar"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog"
)

// thief owns the store of a region: it has kept every state of the catalog, byte
// for byte, and shows what it likes. It has none of the keys.
type thief struct {
	*world
	objects upload.Store
	states  []map[string][]byte // after each change, all objects of the catalog
	reader  *instar.Instar      // a machine that has seen the newest
	image   string              // one that is in all states but the first
	attacks int
}

func (f *thief) snapshot(t *testing.T) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for o, err := range f.objects.List(t.Context(), "catalog/") {
		if err != nil {
			t.Fatal(err)
		}
		b, _, err := upload.GetBytes(t.Context(), f.objects, o.Key, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		all[o.Key] = b
	}
	return all
}

// show makes the store hold these objects and no others.
func (f *thief) show(t *testing.T, objects map[string][]byte) {
	t.Helper()
	have := f.snapshot(t)
	for key, b := range objects {
		if !bytes.Equal(have[key], b) {
			f.put(t, key, b)
		}
	}
	for key := range have {
		if _, keep := objects[key]; !keep {
			if err := f.objects.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (f *thief) put(t *testing.T, key string, b []byte) {
	t.Helper()
	if _, err := upload.PutBytes(t.Context(), f.objects, key, b, upload.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (f *thief) newest() map[string][]byte { return maps.Clone(f.states[len(f.states)-1]) }

// with is the newest state with some objects replaced; nil ones are missing.
func (f *thief) with(changes map[string][]byte) map[string][]byte {
	all := f.newest()
	for key, b := range changes {
		if all[key] = b; b == nil {
			delete(all, key)
		}
	}
	return all
}

// words are a command about this region's catalog.
func (f *thief) words(words ...string) []string {
	return append(words, "--store", f.world.store(f.bucket), "--signers", f.path("signers"))
}

func (f *thief) signed(words ...string) []string {
	return append(f.words(words...), "--sign", f.path("key"))
}

// refused expects that everybody who looks at these objects finds out, that nobody
// who changes something does so on top of them, and that afterwards the newest is
// believed again.
func (f *thief) refused(t *testing.T, name string, objects map[string][]byte, says string) {
	t.Helper()
	f.attacks++
	code := instar.Trust
	if len(objects[catalog.HeadKey]) >= 1<<20 { // which is not read at all
		code = instar.S3
	}
	f.show(t, objects)
	for _, args := range [][]string{
		f.words("catalog", "show"), f.words("images", "list", "--registered"), f.signed("images", "tag", f.image, "on=top", "--account", alice), f.signed("catalog", "gc"),
	} {
		r := f.reader.Run(t, args...)
		if r.Code != code || !strings.Contains(r.Stderr, says) {
			t.Errorf("%s: %s: exit %d, want %d and %q: %s", name, strings.Join(args[:2], " "), r.Code, code, says, r.Stderr)
		}
	}
	for _, form := range []url.Values{
		describe,
		{"Action": {"DescribeImages"}, "ImageId.1": {f.image}},
		{"Action": {"CreateTags"}, "ResourceId.1": {f.image}, "Tag.1.Key": {"on-top"}},
		{"Action": {"RegisterImage"}, "Name": {"on-top"}, "RootDeviceName": {"/dev/sda"}},
		{"Action": {"DeregisterImage"}, "ImageId": {f.image}},
	} {
		if status, doc := f.ask(t, form); status != http.StatusInternalServerError || element(doc, "Code") != "InternalError" || strings.Contains(doc, f.image) {
			t.Errorf("%s: the server answers %s with %d %s", name, form.Get("Action"), status, doc)
		}
	}
	if now := f.snapshot(t); !maps.EqualFunc(now, objects, bytes.Equal) {
		t.Errorf("%s: something was written on top of it: %d objects, %d before", name, len(now), len(objects))
	}
	f.show(t, f.newest())
	f.fine(t, "after "+name)
}

// damaged expects that who reads these objects anew finds out, and that the
// server, which has read and verified others under their names, goes on with
// those.
func (f *thief) damaged(t *testing.T, name string, objects map[string][]byte, code int, says string) {
	t.Helper()
	f.attacks++
	f.show(t, objects)
	r := f.reader.Run(t, f.words("images", "list", "--registered")...)
	if r.Code != code || !strings.Contains(r.Stderr, says) {
		t.Errorf("%s: exit %d, want %d and %q: %s", name, r.Code, code, says, r.Stderr)
	}
	if _, doc := f.ask(t, describe); !strings.Contains(doc, f.image) || strings.Contains(doc, "gone") {
		t.Errorf("%s: the server answers %s", name, doc)
	}
	f.show(t, f.newest())
	f.fine(t, "after "+name)
}

// fine expects the newest state to be shown.
func (f *thief) fine(t *testing.T, name string) {
	t.Helper()
	f.reader.Want(t, instar.OK, f.words("catalog", "show")...)
	if status, doc := f.ask(t, describe); status != http.StatusOK || !strings.Contains(doc, f.image) || strings.Contains(doc, "gone") {
		t.Errorf("%s: the server answers %d %s", name, status, doc)
	}
}

// ask asks the server, as the images' owner.
func (f *thief) ask(t *testing.T, form url.Values) (int, string) {
	t.Helper()
	return post(t, f.url, "ec2", region, aws.Credentials{AccessKeyID: "AKALICE", SecretAccessKey: "alice-secret-key"}, form)
}

var describe = url.Values{"Action": {"DescribeImages"}, "Owner.1": {"self"}}

// TestAttacks: rollback, freeze, mix-and-match, forgery and damage by whoever owns
// the store, MinIO, byte for byte, before readers on the command line and before the
// server.
func TestAttacks(t *testing.T) {
	t.Parallel() // it waits, at the end
	w := prepare(t)
	w.url = w.serve(t, w.bucket)
	k := w.open(t)
	f := &thief{world: w, objects: k.Objects(), reader: w.With("INSTAR_STATE=" + w.path("reader"))}
	keep := func() { f.states = append(f.states, f.snapshot(t)) }
	keep()
	change := func(form url.Values) string {
		t.Helper()
		status, doc := f.ask(t, form)
		if status != http.StatusOK {
			t.Fatalf("%s: %d %s", form.Get("Action"), status, doc)
		}
		keep()
		return element(doc, "imageId")
	}
	f.image = change(url.Values{"Action": {"RegisterImage"}, "Name": {"stays"}, "RootDeviceName": {"/dev/sda"}})
	gone := change(url.Values{"Action": {"RegisterImage"}, "Name": {"gone"}, "RootDeviceName": {"/dev/sda"}})
	change(url.Values{"Action": {"ModifyImageAttribute"}, "ImageId": {f.image}, "LaunchPermission.Add.1.UserId": {bob}})
	change(url.Values{"Action": {"ModifyImageAttribute"}, "ImageId": {f.image}, "LaunchPermission.Remove.1.UserId": {bob}})
	change(url.Values{"Action": {"DeregisterImage"}, "ImageId": {gone}})
	f.fine(t, "the newest")

	// Rollback.
	const older = "older than one seen before"
	for _, i := range []int{0, 2, 4} {
		f.refused(t, fmt.Sprintf("the whole store as after change %d", i+1), f.states[i], older)
	}
	f.refused(t, "the head of the change before, alone", f.with(map[string][]byte{catalog.HeadKey: f.states[4][catalog.HeadKey]}), older)
	f.refused(t, "no head", f.with(map[string][]byte{catalog.HeadKey: nil}), older)
	f.refused(t, "nothing at all", nil, older)

	// Who has never seen it cannot know: that is what --expires is for, below.
	f.show(t, f.states[3])
	w.With("INSTAR_STATE="+w.path("never")).Want(t, instar.OK, f.words("catalog", "show")...)
	// A server that begins again remembers.
	r := w.Run(t, append(w.on("catalog", "serve", w.bucket, "--accounts", w.path("accounts.yaml")), "--listen", "127.0.0.1:0")...)
	if r.Code != instar.Trust || !strings.Contains(r.Stderr, older) {
		t.Errorf("a server that begins on an older state: %s", r)
	}
	f.show(t, f.newest())

	// Mix and match.
	theirs := (&thief{world: w, objects: f.bucketOf(t, w.bucket2)}).snapshot(t)
	f.refused(t, "the catalog of another region, whole", theirs, "of another catalog")
	f.refused(t, "its head alone", f.with(map[string][]byte{catalog.HeadKey: theirs[catalog.HeadKey]}), "of another catalog")
	root, page, oldRoot, oldPage := f.parts(t, f.newest())[0], f.parts(t, f.newest())[1], f.parts(t, f.states[3])[0], f.parts(t, f.states[3])[1]
	last := f.newest()
	for _, x := range []struct {
		name    string
		objects map[string][]byte
		code    int
		says    string
	}{
		{"an older root under the newest's name", f.with(map[string][]byte{root: f.states[3][oldRoot]}), instar.Trust, "not the bytes its name says"},
		{"an older page under the newest's name", f.with(map[string][]byte{page: f.states[3][oldPage]}), instar.Trust, "not the bytes its name says"},
		{"a page for the root", f.with(map[string][]byte{root: last[page]}), instar.Trust, "not the bytes its name says"},
		{"the root for a page", f.with(map[string][]byte{page: last[root]}), instar.Trust, "not the bytes its name says"},
		{"a bit of the root", f.with(map[string][]byte{root: flipped(last[root], len(last[root])/2)}), instar.Trust, "not the bytes its name says"},
		{"a bit of the page", f.with(map[string][]byte{page: flipped(last[page], len(last[page])/2)}), instar.Trust, "not the bytes its name says"},
		{"a root with more behind it", f.with(map[string][]byte{root: append(bytes.Clone(last[root]), '\n')}), instar.Trust, ""},
		{"half a page", f.with(map[string][]byte{page: last[page][:len(last[page])/2]}), instar.Trust, ""},
		{"no root", f.with(map[string][]byte{root: nil}), instar.S3, ""},
		{"no page", f.with(map[string][]byte{page: nil}), instar.S3, ""},
	} {
		f.damaged(t, x.name, x.objects, x.code, x.says)
	}

	// Forgery.
	doc, sig, err := chunked.Split(last[catalog.HeadKey])
	if err != nil {
		t.Fatal(err)
	}
	loopfs.Run(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", w.path("stranger"))
	forged := map[string][]byte{"no signature": doc, "a signature of nothing": sig, "a head without end": bytes.Repeat([]byte("x"), 1<<20), "an empty head": {}}
	for name, by := range map[string]string{"a stranger's signature": "stranger", "a signature for images": "key"} {
		signer, err := keys.ReadSigner(w.path(by), nil)
		if err != nil {
			t.Fatal(err)
		}
		namespace := catalog.Namespace
		if by == "key" {
			namespace = chunked.NamespaceHead
		}
		if forged[name], err = chunked.Sign(t.Context(), doc, namespace, signer); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		forged[fmt.Sprintf("bit %d of 6", i)] = flipped(last[catalog.HeadKey], i*len(last[catalog.HeadKey])/6)
	}
	for _, name := range slices.Sorted(maps.Keys(forged)) {
		f.refused(t, name, f.with(map[string][]byte{catalog.HeadKey: forged[name]}), "")
	}

	// Freeze: a state that is good for an hour, signed two hours ago and hidden
	// behind since.
	signed := func(ago time.Duration) {
		t.Helper()
		old := w.openWith(t, func(o *catalog.Options) {
			o.Expires, o.Now = time.Hour, func() time.Time { return time.Now().Add(-ago) }
			o.Lapsed = true // or a clock that is behind signs nothing
		})
		if err := old.Renew(t.Context()); err != nil {
			t.Fatal(err)
		}
		keep()
	}
	signed(2 * time.Hour)
	frozen := f.newest()
	const stale = "too old to be taken as fresh"
	for _, machine := range []*instar.Instar{f.reader, w.With("INSTAR_STATE=" + w.path("never-2"))} {
		for _, args := range [][]string{f.words("catalog", "show"), f.signed("catalog", "renew"), f.signed("images", "tag", f.image, "on=top", "--account", alice)} {
			if r := machine.Run(t, args...); r.Code != instar.Trust || !strings.Contains(r.Stderr, stale) {
				t.Errorf("frozen: %s: %s", strings.Join(args[:2], " "), r)
			}
		}
	}
	for _, form := range []url.Values{describe, {"Action": {"CreateTags"}, "ResourceId.1": {f.image}, "Tag.1.Key": {"on-top"}}} {
		if status, doc := f.ask(t, form); status != http.StatusInternalServerError {
			t.Errorf("frozen: the server answers %s with %d %s", form.Get("Action"), status, doc)
		}
	}
	f.reader.Want(t, instar.OK, f.signed("catalog", "renew", "--lapsed")...)
	keep()
	f.fine(t, "renewed")
	f.refused(t, "the frozen state again", frozen, older)
	f.show(t, frozen)
	if r := w.With("INSTAR_STATE="+w.path("never-3")).Run(t, f.words("catalog", "show")...); r.Code != instar.Trust || !strings.Contains(r.Stderr, stale) {
		t.Errorf("who has never seen the catalog takes a frozen state: %s", r)
	}
	f.show(t, f.newest())

	// The server renews what is half over.
	signed(40 * time.Minute)
	was := f.sequence(t)
	for deadline := time.Now().Add(2 * time.Minute); f.sequence(t) == was; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server does not renew the catalog")
		}
	}
	keep()
	f.fine(t, "renewed by the server")
	t.Logf("%d attacks", f.attacks)
}

func flipped(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}

// parts are the keys of a state's root and of its only page.
func (f *thief) parts(t *testing.T, objects map[string][]byte) [2]string {
	t.Helper()
	var p [2]string
	doc, _, err := chunked.Split(objects[catalog.HeadKey])
	if err != nil {
		t.Fatal(err)
	}
	var head struct{ Root string }
	var root struct{ Pages []struct{ Name string } }
	if err := json.Unmarshal(doc, &head); err != nil {
		t.Fatal(err)
	}
	p[0] = catalog.DataFold + head.Root
	if err := json.Unmarshal(objects[p[0]], &root); err != nil || len(root.Pages) != 1 {
		t.Fatalf("the root: %v %s", err, objects[p[0]])
	}
	p[1] = catalog.DataFold + root.Pages[0].Name
	return p
}

func (f *thief) sequence(t *testing.T) int64 {
	t.Helper()
	v, err := f.open(t).View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v.Sequence()
}

// bucketOf opens the store of another catalog.
func (f *thief) bucketOf(t *testing.T, bucket string) upload.Store {
	t.Helper()
	s, err := upload.Open(t.Context(), f.world.store(bucket), upload.Options{
		Endpoint: f.minio.Endpoint, Region: f.minio.Region, Credentials: &upload.Credentials{AccessKeyID: f.minio.AccessKey, SecretAccessKey: f.minio.SecretKey},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}
