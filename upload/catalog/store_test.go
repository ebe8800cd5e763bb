package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/upload/catalog/lease"
)

// storing is a region with a registered bundle.
type storing struct {
	*region
	c, key *Catalog
	image  *Image
}

var asAlice = Call{Account: alice, By: "test"}

func newStoring(t testing.TB) *storing {
	t.Helper()
	r := &region{"test-1", newMemory(), newMemory()}
	s := &storing{region: r, key: open(t, r.mem.client(nil), testSigner(t), nil)}
	s.c = r.open(t, s.key, nil)
	if err := s.c.Create(t.Context(), r.name); err != nil {
		t.Fatal(err)
	}
	var err error
	s.image, err = s.c.Register(t.Context(), asAlice, Registration{Image: Image{
		Name: "bundle", Location: bundleIn(t, r.buckets), Description: "the d\u00e9scription", Tags: Tags{"k": "v"}, SourceInstance: "i-1",
		GettingStarted: "one\ntwo", Files: []File{{Path: "/etc/motd", Content: []byte("hello")}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put stores the image and gives the object.
func (s *storing) put(t testing.TB) []byte {
	t.Helper()
	task, err := s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	if err != nil {
		t.Fatal(err)
	}
	if task, err = s.c.CompleteStore(t.Context(), "test", task, nil); err != nil || task.State != Completed {
		t.Fatalf("%+v, %v", task, err)
	}
	object := s.buckets.snapshot()[s.image.ID+".bin"].data
	if int64(len(object)) != task.Size {
		t.Fatalf("the object has %d bytes, the task says %d", len(object), task.Size)
	}
	return object
}

func (s *storing) restore(t testing.TB, r RestoreRequest) (*Image, error) {
	t.Helper()
	m, err := s.c.Restore(t.Context(), asAlice, r)
	if err != nil {
		return nil, err
	}
	if m.State != Pending {
		t.Errorf("%s is %s before anything was fetched", m.ID, m.State)
	}
	return s.c.CompleteRestore(t.Context(), asAlice, "test", m.ID, nil)
}

// TestStoreAndRestore: what comes back is what was stored, under a new id.
func TestStoreAndRestore(t *testing.T) {
	s := newStoring(t)
	if _, err := s.c.ModifyLaunchPermissions(t.Context(), asAlice, s.image.ID, Permissions{Public: true, Accounts: []string{bob}}, Permissions{}); err != nil {
		t.Fatal(err)
	}
	object := s.put(t)
	_, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: s.image.ID + ".bin"})
	code(t, err, CodeAMINameDuplicate) // the original has it
	m, err := s.restore(t, RestoreRequest{Bucket: "bkt", Key: s.image.ID + ".bin", Name: "again", Tags: Tags{"k": "w", "n": "m"}})
	if err != nil {
		t.Fatal(err)
	}
	want := s.image.Clone()
	want.ID, want.Name, want.Location, want.Tags = m.ID, "again", m.Location, Tags{"k": "w", "n": "m"}
	want.SourceImage, want.SourceRegion, want.SourceObject = s.image.ID, "test-1", "bkt/"+s.image.ID+".bin"
	want.Created, want.Revision, want.History = m.Created, m.Revision, m.History
	if !reflect.DeepEqual(m, want) || m.ID == s.image.ID {
		t.Errorf("restored is\n%+v, want\n%+v", m, want)
	}
	if m.State != Available || !s.whole(m) || m.Location == s.image.Location {
		t.Errorf("it is %s at %s", m.State, m.Location)
	}
	if again, err := s.c.CompleteRestore(t.Context(), asAlice, "test", m.ID, nil); err != nil || again.Revision != m.Revision {
		t.Errorf("restored again: %+v, %v", again, err)
	}
	_, err = s.c.CompleteCopy(t.Context(), asAlice, m.ID, s.c, nil)
	if err != nil {
		t.Error(err) // it is available
	}
	// Another region restores it with the name it had; bob's has not what alice's has.
	other := &storing{region: &region{"other-1", newMemory(), newMemory()}}
	other.c = other.open(t, s.key, nil)
	if err := other.c.Create(t.Context(), "other-1"); err != nil {
		t.Fatal(err)
	}
	other.buckets.set("from/o.bin", object)
	m, err = other.restore(t, RestoreRequest{Bucket: "bkt", Key: "from/o.bin"})
	if err != nil || m.Name != "bundle" || m.SourceRegion != "test-1" || m.Tags["k"] != "v" || !other.whole(m) || m.Public || len(m.LaunchAccounts) > 0 {
		t.Errorf("%+v, %v", m, err)
	}
	task, err := s.c.Store(t.Context(), Call{Account: bob}, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/of-bob"})
	if err == nil {
		task, err = s.c.CompleteStore(t.Context(), "test", task, nil)
	}
	if err != nil || task.Key != "of-bob/"+s.image.ID+".bin" {
		t.Fatalf("%+v, %v", task, err)
	}
	m, err = s.restore(t, RestoreRequest{Bucket: "bkt", Key: task.Key, Name: "of bob"})
	if err != nil || len(m.Tags) != 0 || m.SourceInstance != "" {
		t.Errorf("%+v, %v", m, err)
	}
	_, err = s.c.Store(t.Context(), Call{Account: carol}, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	code(t, err, CodeAuthFailure) // it is shared with everybody, not with carol
	_, err = s.c.Store(t.Context(), Call{Account: carol, DryRun: true}, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	code(t, err, CodeUnauthorized)
	_, err = s.c.Store(t.Context(), Call{Account: alice, DryRun: true}, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	code(t, err, CodeDryRun)
	_, err = s.c.Restore(t.Context(), Call{Account: alice, DryRun: true}, RestoreRequest{Bucket: "bkt", Key: task.Key, Name: "tried"})
	code(t, err, CodeDryRun)
}

// TestStoreRefused: what is not stored, and where nothing is put.
func TestStoreRefused(t *testing.T) {
	s := newStoring(t)
	ask := func(call Call, r StoreRequest) error { _, err := s.c.Store(t.Context(), call, r); return err }
	none := record(t, s.c, alice, "nothing")
	code(t, ask(asAlice, StoreRequest{ImageID: none.ID, Bucket: "bkt"}), CodeParameterValue)
	code(t, ask(asAlice, StoreRequest{ImageID: "ami-00000000000000000", Bucket: "bkt"}), CodeAMINotFound)
	code(t, ask(Call{Account: bob}, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"}), CodeAMINotFound)
	code(t, ask(asAlice, StoreRequest{ImageID: "image", Bucket: "bkt"}), CodeAMIMalformed)
	code(t, ask(asAlice, StoreRequest{ImageID: s.image.ID, Bucket: ".."}), CodeParameterValue)
	code(t, ask(asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/../other"}), CodeParameterValue)
	many := Tags{}
	for i := range 11 {
		many[fmt.Sprint(i)] = ""
	}
	for _, tags := range []Tags{many, {"aws:x": ""}, {"a": "b&c"}, {strings.Repeat("k", 128): ""}, {"": "v"}} {
		code(t, ask(asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt", Tags: tags}), CodeParameterValue)
	}
	// What is something else is not replaced.
	s.buckets.set(s.image.ID+".bin", []byte("my diary"))
	code(t, ask(asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"}), CodeParameterValue)
	if got := s.buckets.snapshot()[s.image.ID+".bin"].data; string(got) != "my diary" {
		t.Errorf("there is %q", got)
	}
	// Asked again while it is under way, it is the same task; with other tags it is
	// none.
	first, err := s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/x", Tags: Tags{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/x", Tags: Tags{"a": "b"}}); err != nil || !reflect.DeepEqual(again, first) {
		t.Errorf("%+v, %v", again, err)
	}
	code(t, ask(asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/x"}), CodeState)
	// What somebody else is at is left to him.
	l, err := lease.Take(t.Context(), s.c.Objects(), first.lease(), "another", time.Now)
	if err != nil {
		t.Fatal(err)
	}
	l.Note(40)
	if _, err := s.c.CompleteStore(t.Context(), "test", first, nil); !errors.Is(err, lease.ErrTaken) {
		t.Errorf("while another is at it: %v", err)
	}
	if err := l.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A task whose image is gone ends.
	if err := s.c.Deregister(t.Context(), asAlice, s.image.ID); err != nil {
		t.Fatal(err)
	}
	_, err = s.c.CompleteStore(t.Context(), "test", first, nil)
	code(t, err, CodeAMIUnavailable)
	v, err := s.c.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all, err := v.StoreTasks(t.Context(), alice)
	if err != nil || len(all) != 1 || all[0].State != TaskFailed || !strings.Contains(all[0].Reason, "no longer available") || all[0].Ended.IsZero() {
		t.Errorf("%+v, %v", all, err)
	}
	if n, err := s.c.StoreProgress(t.Context(), all[0]); n != 0 || err != nil {
		t.Errorf("its progress is %d, %v", n, err)
	}
}

// TestStoreCut: a store that is killed, or meets a fault, at each of its requests:
// there is never an object that is not whole, and the task, gone on with, ends.
func TestStoreCut(t *testing.T) {
	s := newStoring(t)
	mem, buckets := s.mem.snapshot(), s.buckets.snapshot()
	other := &region{"other-1", newMemory(), newMemory()}
	if err := other.open(t, s.key, nil).Create(t.Context(), "other-1"); err != nil {
		t.Fatal(err)
	}
	empty := other.mem.snapshot()
	for _, how := range []string{"killed before", "killed after", "fault", "lost reply"} {
		cuts := 0
		for at := 1; ; at++ {
			s.mem.restore(mem)
			s.buckets.restore(buckets)
			s.c = s.open(t, s.key, nil)
			hit := false
			c := s.open(t, s.key, cutter(how, at, &hit, nil))
			request := StoreRequest{ImageID: s.image.ID, Bucket: "bkt"}
			look := func() {
				t.Helper()
				if _, ok := s.buckets.snapshot()[s.image.ID+".bin"]; !ok {
					return
				}
				other.mem.restore(empty)
				other.buckets.restore(map[string]memObject{})
				r := &storing{region: other}
				r.c = r.open(t, s.key, nil)
				r.buckets.set("o.bin", s.buckets.snapshot()[s.image.ID+".bin"].data)
				if m, err := r.restore(t, RestoreRequest{Bucket: "bkt", Key: "o.bin"}); err != nil || !r.whole(m) {
					t.Fatalf("%s at %d: the object is not whole: %v", how, at, err)
				}
			}
			task, err := c.Store(t.Context(), asAlice, request)
			if err == nil {
				_, err = c.CompleteStore(t.Context(), "first", task, nil)
			}
			look()
			if !hit {
				if err != nil {
					t.Fatalf("without a cut: %v", err)
				}
				break
			}
			cuts++
			if task, err = s.c.Store(t.Context(), asAlice, request); err != nil {
				t.Fatalf("%s at %d, again: %v", how, at, err)
			}
			// Whoever was killed holds his lease until it ends.
			later := s.open(t, s.key, nil)
			later.opt.Now = func() time.Time { return time.Now().Add(3 * time.Minute) }
			if task, err = later.CompleteStore(t.Context(), "second", task, nil); err != nil || task.State != Completed {
				t.Fatalf("%s at %d, gone on with: %+v, %v", how, at, task, err)
			}
			look()
		}
		if cuts < 20 {
			t.Errorf("%s: only %d cuts", how, cuts)
		}
		t.Logf("%s: %d cuts", how, cuts)
	}
}

// cutter is what happens at the request number at: of those before they are carried
// out, or of those after.
func cutter(how string, at int, hit *bool, lie func(op, key string)) func(op, key string, done bool) error {
	var mu sync.Mutex
	n, dead := 0, false
	return func(op, key string, done bool) error {
		mu.Lock()
		defer mu.Unlock()
		if dead {
			return errKilled
		}
		if done != (how == "killed after" || how == "lost reply" || how == "corrupted") {
			return nil
		}
		if n++; n != at {
			return nil
		}
		*hit = true
		switch how {
		case "killed before", "killed after":
			dead = true
			return errKilled
		case "corrupted":
			lie(op, key)
			return nil
		}
		return errFault
	}
}

// TestRestoreCut is TestStoreCut for the way back: whenever somebody looks, an image
// that is available is whole.
func TestRestoreCut(t *testing.T) {
	from := newStoring(t)
	object := from.put(t)
	s := &storing{region: &region{"other-1", newMemory(), newMemory()}}
	if err := s.open(t, from.key, nil).Create(t.Context(), "other-1"); err != nil {
		t.Fatal(err)
	}
	s.buckets.set("o.bin", object)
	mem, buckets := s.mem.snapshot(), s.buckets.snapshot()
	for _, how := range []string{"killed before", "killed after", "fault", "lost reply", "corrupted"} {
		cuts := 0
		for at := 1; ; at++ {
			s.mem.restore(mem)
			s.buckets.restore(buckets)
			s.c = s.open(t, from.key, nil)
			hit := false
			c := s.open(t, from.key, cutter(how, at, &hit, func(op, key string) {
				if op == "put" {
					s.buckets.spoil(key)
				}
			}))
			look := func(when string) {
				t.Helper()
				v, err := s.c.View(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for m, err := range v.Images(t.Context()) {
					if err != nil || m.State == Available && !s.whole(m) {
						t.Fatalf("%s at %d, %s: %s is available and not whole: %v", how, at, when, m.ID, err)
					}
				}
			}
			request := RestoreRequest{Bucket: "bkt", Key: "o.bin", Token: "token"}
			m, err := c.Restore(t.Context(), asAlice, request)
			if err == nil {
				look("begun")
				_, err = c.CompleteRestore(t.Context(), asAlice, "first", m.ID, nil)
			}
			look("cut")
			if !hit {
				if err != nil {
					t.Fatalf("without a cut: %v", err)
				}
				break
			}
			cuts++
			again, err := s.c.Restore(t.Context(), asAlice, request)
			if err != nil || m != nil && again.ID != m.ID {
				t.Fatalf("%s at %d, again: %+v, %v", how, at, again, err)
			}
			later := s.open(t, from.key, nil)
			later.opt.Now = func() time.Time { return time.Now().Add(3 * time.Minute) }
			done, err := later.CompleteRestore(t.Context(), asAlice, "second", again.ID, nil)
			var refusal *Error
			if how == "corrupted" && errors.As(err, &refusal) {
				continue // it was found out, and the image failed
			}
			if err != nil || done.State != Available {
				t.Fatalf("%s at %d, gone on with: %+v, %v", how, at, done, err)
			}
			look("gone on with")
		}
		if cuts < 20 {
			t.Errorf("%s: only %d cuts", how, cuts)
		}
		t.Logf("%s: %d cuts", how, cuts)
	}
}

// TestHostileObjects: an object that was changed anywhere, signed by somebody else,
// or is another one by now, makes no image available.
func TestHostileObjects(t *testing.T) {
	s := newStoring(t)
	object := s.put(t)
	try := func(name string, b []byte, step int) {
		t.Helper()
		s.buckets.set("bad.bin", b)
		m, err := s.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: "bad.bin", Name: "bad " + fmt.Sprint(step)})
		if err == nil {
			_, err = s.c.CompleteRestore(t.Context(), asAlice, "test", m.ID, nil)
		}
		if m != nil {
			v, verr := s.c.View(t.Context())
			if verr != nil {
				t.Fatal(verr)
			}
			now, verr := v.Image(t.Context(), m.ID)
			if verr != nil || now.State == Available && !s.whole(now) {
				t.Fatalf("%s at %d: it is %+v, %v", name, step, now, verr)
			}
			if err != nil && now.State != Failed {
				t.Errorf("%s at %d: it is %s: %v", name, step, now.State, err)
			}
		}
		var refusal *Error
		if err != nil && !errors.As(err, &refusal) {
			t.Errorf("%s at %d: no refusal: %v", name, step, err)
		}
	}
	for i := 0; i < len(object); i += 1 + len(object)/150 {
		b := bytes.Clone(object)
		b[i] ^= 4
		try("changed", b, i)
	}
	for i := 0; i < len(object)-2048; i += 1 + len(object)/20 {
		try("cut", object[:i], 1000000+i)
	}
	// Another's signature, over the very same document.
	stranger := testSigner(t)
	theirs := s.open(t, open(t, s.mem.client(nil), stranger, nil), nil)
	theirs.opt.Trust = trustIn(stranger.Public(), s.key.opt.Signer.Public())
	task, err := theirs.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt/theirs"})
	if err == nil {
		_, err = theirs.CompleteStore(t.Context(), "test", task, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.c.opt.Trust, s.key.opt.Trust = trustIn(s.key.opt.Signer.Public()), trustIn(s.key.opt.Signer.Public())
	good := &storing{region: &region{"other-1", newMemory(), s.buckets}}
	good.c = good.open(t, s.key, nil)
	if err := good.c.Create(t.Context(), "other-1"); err != nil {
		t.Fatal(err)
	}
	_, err = good.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: task.Key})
	code(t, err, CodeParameterValue)
	if !IsUntrusted(err) {
		t.Errorf("a stranger's object: %v", err)
	}
	// What is there when it is fetched is not what it was when it was asked for.
	m, err := good.c.Restore(t.Context(), asAlice, RestoreRequest{Bucket: "bkt", Key: s.image.ID + ".bin"})
	if err != nil {
		t.Fatal(err)
	}
	other := newStoring(t)
	other.key.opt.Signer, other.c.opt.Signer, other.c.opt.Trust = s.key.opt.Signer, s.key.opt.Signer, trustIn(s.key.opt.Signer.Public(), other.c.opt.Signer.Public())
	s.buckets.set(s.image.ID+".bin", other.put(t))
	_, err = good.c.CompleteRestore(t.Context(), asAlice, "test", m.ID, nil)
	code(t, err, CodeManifest)
}

// TestDamagedSource: an image that is damaged is not stored, and the task says which
// part it is.
func TestDamagedSource(t *testing.T) {
	s := newStoring(t)
	bad := bytes.Clone(s.buckets.m["p/web-1.0.part.05"].data)
	bad[7] ^= 1
	s.buckets.set("p/web-1.0.part.05", bad)
	task, err := s.c.Store(t.Context(), asAlice, StoreRequest{ImageID: s.image.ID, Bucket: "bkt"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.c.CompleteStore(context.WithoutCancel(t.Context()), "test", task, nil)
	code(t, err, CodeManifest)
	if _, ok := s.buckets.snapshot()[s.image.ID+".bin"]; ok || !strings.Contains(fmt.Sprint(err), "web-1.0.part.05") {
		t.Errorf("there is an object: %v, %v", ok, err)
	}
}

// TestPutOptions: memory does not grow with the object but where S3's count of
// parts demands it.
func TestPutOptions(t *testing.T) {
	for _, c := range []struct {
		size, part int64
		parallel   int
	}{{1, 16 << 20, 4}, {100 << 30, 16 << 20, 4}, {200 << 30, 22 << 20, 2}, {1 << 40, 111 << 20, 1}, {5 << 40, 552 << 20, 1}} {
		o := putOptions(c.size)
		if o.PartSize != c.part || o.Parallel != c.parallel || c.size/o.PartSize > 10_000 {
			t.Errorf("%d bytes: parts of %d MiB, %d at a time", c.size, o.PartSize>>20, o.Parallel)
		}
	}
}
