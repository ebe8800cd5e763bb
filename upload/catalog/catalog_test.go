package catalog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload"
)

const (
	alice = "111111111111"
	bob   = "222222222222"
	carol = "333333333333"
)

func testSigner(t testing.TB) keys.Signer {
	t.Helper()
	s, err := keys.WriteSigningKey(filepath.Join(t.TempDir(), "key"), "")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func trustIn(ks ...ssh.PublicKey) *keys.AllowedSigners {
	var l []keys.AllowedSigner
	for _, k := range ks {
		l = append(l, keys.AllowedSigner{Principals: "*", Namespaces: Namespace, Key: k})
	}
	return keys.NewAllowedSigners(l...)
}

func dirStore(t testing.TB) upload.Store {
	t.Helper()
	s, err := upload.Open(t.Context(), "file://"+t.TempDir(), upload.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// open opens the catalog of a store with a signer it trusts.
func open(t testing.TB, s upload.Store, signer keys.Signer, change func(*Options)) *Catalog {
	t.Helper()
	o := Options{Trust: trustIn(signer.Public()), Signer: signer}
	if change != nil {
		change(&o)
	}
	c, err := Open(s, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fresh is a new catalog of region test-1.
func fresh(t testing.TB) *Catalog {
	t.Helper()
	c := open(t, dirStore(t), testSigner(t), nil)
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	return c
}

// record registers an image without bytes.
func record(t testing.TB, c *Catalog, owner, name string) *Image {
	t.Helper()
	m, err := c.Register(t.Context(), Call{Account: owner}, Registration{Image: Image{Name: name, RootDeviceName: "/dev/sda1", Architecture: "x86_64"}})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func code(t testing.TB, err error, want string) {
	t.Helper()
	if got := CodeOf(err); got != want {
		t.Errorf("%v: code %q, want %q", err, got, want)
	}
}

func TestLifecycle(t *testing.T) {
	c := fresh(t)
	ctx := t.Context()
	a := Call{Account: alice, By: "test"}
	m := record(t, c, alice, "web-1")
	_, err := c.Register(ctx, a, Registration{Image: Image{Name: "web-1", RootDeviceName: "/dev/sda1"}})
	code(t, err, CodeAMINameDuplicate)
	record(t, c, bob, "web-1") // another owner's names are others
	code(t, c.Deregister(ctx, Call{Account: bob}, m.ID), CodeAMINotFound)
	if _, err := c.ModifyLaunchPermissions(ctx, a, m.ID, Permissions{Accounts: []string{bob}}, Permissions{}); err != nil {
		t.Fatal(err)
	}
	code(t, c.Deregister(ctx, Call{Account: bob}, m.ID), CodeAuthFailure)
	code(t, c.Deregister(ctx, Call{Account: bob, DryRun: true}, m.ID), CodeUnauthorized)
	code(t, c.Deregister(ctx, Call{Account: alice, DryRun: true}, m.ID), CodeDryRun)
	if err := c.SetTags(ctx, a, []string{m.ID}, Tags{"env": "prod", "b": ""}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.SetProtection(ctx, a, m.ID, true, false); err != nil {
		t.Fatal(err)
	}
	code(t, c.Deregister(ctx, a, m.ID), CodeNotPermitted)
	if _, err := c.SetProtection(ctx, a, m.ID, false, false); err != nil {
		t.Fatal(err)
	}
	v, err := c.View(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found, err := v.Describe(ctx, alice, Query{Filters: []Filter{{"tag:env", []string{"p*"}}, {"name", []string{"web-?"}}}})
	if err != nil || len(found) != 1 || found[0].ID != m.ID {
		t.Fatalf("%v, %v", found, err)
	}
	// Bob sees the image, and not its tags.
	if found, err = v.Describe(ctx, bob, Query{Filters: []Filter{{"tag:env", []string{"p*"}}}}); err != nil || len(found) != 0 {
		t.Fatalf("bob finds %v, %v", found, err)
	}
	long := strings.Repeat("a", 4000)
	_, err = v.Describe(ctx, alice, Query{Filters: []Filter{{"name", []string{long, long}}, {"description", []string{long}}}})
	code(t, err, "FilterLimitExceeded")
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := v.Describe(gone, alice, Query{}); !errors.Is(err, context.Canceled) {
		t.Errorf("asked by nobody any more: %v", err)
	}
	if err := c.Deregister(ctx, a, m.ID); err != nil {
		t.Fatal(err)
	}
	code(t, c.Deregister(ctx, a, m.ID), CodeAMIUnavailable)
	record(t, c, alice, "web-1") // the name is free again
}

// TestCooldown: nothing but a day's time leads from a protection with a cooldown
// to an image that can be deregistered.
func TestCooldown(t *testing.T) {
	type step struct{ on, cooldown bool }
	for _, way := range [][]step{
		{{false, false}},
		{{true, false}, {false, false}},
		{{false, false}, {true, false}, {false, false}},
		{{false, false}, {true, true}, {true, false}, {false, false}},
	} {
		c := open(t, newMemory().client(nil), testSigner(t), nil)
		now := c.opt.Now()
		c.opt.Now = func() time.Time { return now }
		if err := c.Create(t.Context(), "test-1"); err != nil {
			t.Fatal(err)
		}
		m := record(t, c, alice, "web-1")
		for _, s := range append([]step{{true, true}}, way...) {
			now = now.Add(time.Minute)
			if _, err := c.SetProtection(t.Context(), Call{Account: alice}, m.ID, s.on, s.cooldown); err != nil {
				t.Fatal(err)
			}
		}
		now = now.Add(Cooldown - 10*time.Minute)
		code(t, c.Deregister(t.Context(), Call{Account: alice}, m.ID), CodeNotPermitted)
		now = now.Add(10 * time.Minute)
		if err := c.Deregister(t.Context(), Call{Account: alice}, m.ID); err != nil {
			t.Errorf("%v, a day later: %v", way, err)
		}
	}
}

// TestAtOnce: many changes at once, from two processes' worth of catalogs.
func TestAtOnce(t *testing.T) {
	s, signer := dirStore(t), testSigner(t)
	var all []*Catalog
	for range 3 {
		all = append(all, open(t, s, signer, nil))
	}
	if err := all[0].Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			_, err := all[i%3].Register(t.Context(), Call{Account: alice}, Registration{Image: Image{Name: fmt.Sprintf("name-%d", i/2), RootDeviceName: "/dev/sda1"}})
			if err != nil && CodeOf(err) != CodeAMINameDuplicate {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	v, err := all[1].View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, err := range v.Images(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != 15 {
		t.Errorf("%d images, want 15", n)
	}
}

func TestCancelled(t *testing.T) {
	c := fresh(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Renew(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	record(t, c, alice, "after")
}

// careless takes conditions and writes all the same, as some servers do.
type careless struct{ *memStore }

func (s careless) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (upload.Object, error) {
	o.IfMatch, o.IfNoneMatch = "", false
	return s.memStore.Put(ctx, key, body, size, o)
}

// TestConditional: a store on which a compare-and-swap loses what others wrote
// keeps no catalog, not even one that is there already.
func TestConditional(t *testing.T) {
	mem, signer := newMemory(), testSigner(t)
	bad := func() *Catalog { return open(t, careless{mem.client(nil)}, signer, nil) }
	if err := bad().Create(t.Context(), "test-1"); !errors.Is(err, ErrConditional) {
		t.Fatalf("%v", err)
	}
	if err := open(t, mem.client(nil), signer, nil).Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	before := len(mem.snapshot())
	if err := bad().Renew(t.Context()); !errors.Is(err, ErrConditional) {
		t.Fatalf("%v", err)
	}
	if after := len(mem.snapshot()); after != before {
		t.Errorf("%d objects, %d were there", after, before)
	}
}

// TestCollect: what interrupted changes left goes, what the catalog needs stays.
func TestCollect(t *testing.T) {
	mem, signer := newMemory(), testSigner(t)
	c := open(t, mem.client(nil), signer, nil)
	if err := c.Create(t.Context(), "test-1"); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		record(t, c, alice, fmt.Sprintf("image-%d", i))
	}
	if n := len(mem.snapshot()); n > 2*(keptStates+3) {
		t.Errorf("%d objects after 40 changes: those of old states stay", n)
	}
	var cuts int
	for at := range 12 {
		n := 0
		cut := open(t, mem.client(func(op, key string, done bool) error {
			if n++; n > at {
				return errKilled
			}
			return nil
		}), signer, nil)
		if err := cut.Renew(t.Context()); err != nil {
			cuts++
		}
	}
	if cuts == 0 {
		t.Fatal("nothing was cut")
	}
	mem.set(DataFold+"left", []byte("x"))
	dry, err := c.Collect(t.Context(), true)
	if err != nil || dry.Objects == 0 {
		t.Fatalf("%+v, %v", dry, err)
	}
	if _, err := c.Collect(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if again, err := c.Collect(t.Context(), true); err != nil || again.Objects != 0 {
		t.Errorf("%+v, %v", again, err)
	}
	if err := read(t.Context(), open(t, mem.client(nil), signer, nil)); err != nil {
		t.Error(err)
	}
}
