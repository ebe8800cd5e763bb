package quiesce_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/instar-image/instar/agent/quiesce"
	"github.com/instar-image/instar/test/loopfs"
)

// units are units that are names.
type units struct {
	mu     sync.Mutex
	state  map[string]string
	calls  []string
	broken int    // so many calls fail
	bad    string // a unit that never starts
	mute   bool   // nothing is said of a unit's state
}

// all are the calls so far.
func (u *units) all() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.calls)
}

// is is a unit's state.
func (u *units) is(name string) string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state[name]
}

func (u *units) connect(context.Context) (quiesce.Units, func(), error) { return u, func() {}, nil }

func (u *units) do(call, name, state string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls = append(u.calls, call+" "+name)
	if u.broken > 0 {
		u.broken--
		return errors.New("systemd is busy")
	}
	if call == "start" && name == u.bad {
		return errors.New(name + " is broken")
	}
	u.state[name] = state
	return nil
}

func (u *units) Active(_ context.Context, name string) (string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.mute {
		return "", errors.New("no answer")
	}
	if s := u.state[name]; s != "" {
		return s, nil
	}
	return "inactive", nil
}
func (u *units) Start(_ context.Context, n string) error  { return u.do("start", n, "active") }
func (u *units) Stop(_ context.Context, n string) error   { return u.do("stop", n, "inactive") }
func (u *units) Freeze(_ context.Context, n string) error { return u.do("freeze", n, "active") }
func (u *units) Thaw(_ context.Context, n string) error   { return u.do("thaw", n, "active") }

// begin begins a standstill whose guard is in this process.
func begin(t *testing.T, u *units, dir string, p quiesce.Plan, warn func(string)) (*quiesce.Hold, <-chan error, error) {
	t.Helper()
	ended := make(chan error, 1)
	h, err := quiesce.Begin(t.Context(), dir, "x", p, u.connect, func(ctx context.Context) error {
		ready := make(chan struct{})
		go func() {
			ended <- quiesce.Guard(ctx, dir, "x", u.connect, func() error { close(ready); return nil })
		}()
		<-ready
		return nil
	}, warn)
	return h, ended, err
}

func TestStandstill(t *testing.T) {
	u := &units{state: map[string]string{"a": "active", "b": "active", "d": "active"}}
	dir := t.TempDir()
	h, ended, err := begin(t, u, dir, quiesce.Plan{Stop: []string{"a", "b", "off"}, Freeze: []string{"d"}}, func(s string) { t.Error(s) })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"stop a", "stop b", "freeze d"}; !slices.Equal(u.all(), want) {
		t.Errorf("%q, want %q", u.all(), want)
	}
	if err := errors.Join(h.End(), <-ended); err != nil {
		t.Fatal(err)
	}
	// Undone in the other order, and what was off stays off.
	if want := []string{"thaw d", "start b", "start a"}; !slices.Equal(u.all()[3:], want) {
		t.Errorf("%q, want %q", u.all()[3:], want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestFailing: what cannot be made to stand still undoes what did.
func TestFailing(t *testing.T) {
	u := &units{state: map[string]string{"a": "active", "b": "active"}}
	bad := filepath.Join(t.TempDir(), "none")
	_, ended, err := begin(t, u, t.TempDir(), quiesce.Plan{Stop: []string{"a"}, Filesystems: []string{bad}}, func(string) {})
	if err == nil || !strings.Contains(err.Error(), "none") || <-ended == nil {
		t.Errorf("%v", err)
	}
	if u.is("a") != "active" {
		t.Errorf("a is %s: %q", u.is("a"), u.all())
	}
}

// TestLimit: everything goes on when it took too long, and who holds it is told.
func TestLimit(t *testing.T) {
	u := &units{state: map[string]string{"a": "active"}}
	told := make(chan string, 8)
	h, ended, err := begin(t, u, t.TempDir(), quiesce.Plan{Stop: []string{"a"}, Limit: 50 * time.Millisecond}, func(s string) { told <- s })
	if err != nil {
		t.Fatal(err)
	}
	if s := <-told; !strings.Contains(s, "the limit") {
		t.Errorf("told %q", s)
	}
	if err := errors.Join(<-ended, h.End()); err != nil || u.is("a") != "active" {
		t.Errorf("%v, a is %s", err, u.is("a"))
	}
}

// TestSweep: what is written down and has no guard is undone, even if systemd
// does not answer at once.
func TestSweep(t *testing.T) {
	u := &units{state: map[string]string{"a": "inactive"}, broken: 2}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "y.quiesced"), []byte(`{"stop":["a"],"limit":0}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := quiesce.Sweep(t.Context(), dir, u.connect); err != nil || u.is("a") != "active" {
		t.Errorf("%v, a is %s", err, u.is("a"))
	}
	if err := quiesce.Undo(t.Context(), dir, "y", u.connect); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "z.quiesced"), []byte(`{`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := quiesce.Sweep(t.Context(), dir, u.connect); err == nil {
		t.Error("a record that cannot be read is no error")
	}
	// One that has a guard is left to it.
	live := t.TempDir()
	if err := u.Start(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	h, ended, err := begin(t, u, live, quiesce.Plan{Stop: []string{"a"}}, func(s string) { t.Error(s) })
	if err != nil {
		t.Fatal(err)
	}
	if err := quiesce.Sweep(t.Context(), live, u.connect); err != nil || u.is("a") != "inactive" {
		t.Errorf("%v, a is %s", err, u.is("a"))
	}
	if err := errors.Join(h.End(), <-ended); err != nil {
		t.Error(err)
	}
}

// TestUnitThatWouldNotStart is told of once, and is no later standstill's
// trouble; as long as systemd does not answer it stays written down.
func TestUnitThatWouldNotStart(t *testing.T) {
	u := &units{state: map[string]string{"a": "active", "b": "active"}, bad: "a"}
	dir := t.TempDir()
	path := filepath.Join(dir, "y.quiesced")
	if err := os.WriteFile(path, []byte(`{"stop":["a","b"],"limit":0}`), 0o600); err != nil {
		t.Fatal(err)
	}
	sweep := func() (err error) { // without the pauses between its tries
		synctest.Test(t, func(t *testing.T) { err = quiesce.Sweep(t.Context(), dir, u.connect) })
		return err
	}
	u.mute = true
	if err := sweep(); err == nil {
		t.Error("a unit that would not start is no error")
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("systemd did not answer, and what is to be undone is forgotten: %v", err)
	}
	if n := len(slices.DeleteFunc(u.all(), func(c string) bool { return c != "start b" })); n != 1 {
		t.Errorf("b was started %d times", n)
	}
	u.mute = false
	if err := sweep(); err == nil || !strings.Contains(err.Error(), "a is broken") {
		t.Errorf("error %v", err)
	}
	if err := sweep(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	// What another standstill has left, and cannot be read, does not stop this one.
	if err := os.WriteFile(filepath.Join(dir, "z.quiesced"), []byte(`{`), 0o600); err != nil {
		t.Fatal(err)
	}
	h, ended, err := begin(t, u, dir, quiesce.Plan{Stop: []string{"b"}}, func(s string) { t.Error(s) })
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.End(), <-ended); err != nil {
		t.Error(err)
	}
}

func TestSafe(t *testing.T) {
	ext4, btrfs := loopfs.Make(t, "ext4", 16<<20), loopfs.Make(t, "btrfs", 128<<20)
	store := filepath.Join(ext4, "store", "not", "there", "yet")
	for _, c := range []struct {
		mount  string
		writes []string
		want   string
	}{
		{ext4, []string{"/var/lib/instar"}, ""},
		{ext4, []string{store}, "writes to it"},
		{btrfs, nil, "btrfs"},
		{"/", nil, "it holds /"},
		{filepath.Dir(ext4), nil, "no mount point"},
		{filepath.Join(ext4, "none"), nil, "no such file"},
	} {
		err := quiesce.Safe([]string{c.mount}, c.writes...)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			// The root of a container may be a mount point's own parent.
			if c.mount == "/" && err != nil && strings.Contains(err.Error(), "no mount point") {
				continue
			}
			t.Errorf("%s: %v, want %q", c.mount, err, c.want)
		}
	}
}
