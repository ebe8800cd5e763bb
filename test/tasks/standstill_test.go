package tasks

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/systemd"
	"github.com/instar-image/instar/agent/task"
	"github.com/instar-image/instar/test/fakesystemd"
	"github.com/instar-image/instar/test/loopfs"
)

// frozen reports whether a filesystem is frozen: freezing it again is refused.
func frozen(t *testing.T, mount string) bool {
	t.Helper()
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878
	d, err := os.Open(mount)
	must(t, err)
	defer d.Close()
	switch err := unix.IoctlSetInt(int(d.Fd()), fiFreeze, 0); {
	case errors.Is(err, unix.EBUSY):
		return true
	case err != nil:
		t.Fatal(err)
	}
	// Somebody else may thaw it in this moment, to be safe.
	if err := unix.IoctlSetInt(int(d.Fd()), fiThaw, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		t.Fatal(err)
	}
	return false
}

// TestStandstill: what was made to stand still goes on within ten seconds,
// whoever is killed meanwhile.
func TestStandstill(t *testing.T) {
	s := fakesystemd.Start(t)
	s.Declare("app.service", "db.service")
	data := loopfs.Make(t, "ext4", 200<<20)
	h := newHost(t, "--launcher", "systemd")
	r := task.Request{Volume: data, Limits: slow(), Quiesce: &task.Quiesce{Stop: []string{"app.service", "none.service"}, Freeze: []string{"db.service"}, Filesystems: []string{data}}}
	fill(t, data)
	still := func() bool {
		return s.State("app.service") == "inactive" && s.State("db.service") == "frozen" && frozen(t, data)
	}
	goes := func() bool {
		return s.State("app.service") == "active" && s.State("db.service") == "active" && !frozen(t, data)
	}
	if !goes() {
		t.Fatal("it stands still before anything was asked for")
	}
	guards := func() []string {
		return slices.DeleteFunc(s.Units("instar-guard-"), func(n string) bool { return s.PID(n) == 0 })
	}

	t.Run("kill the capture", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		must(t, unix.Kill(s.PID(systemd.TaskUnit(id)), unix.SIGKILL))
		soon(t, "everything goes on", goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("kill the guard", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		must(t, unix.Kill(s.PID(guards()[0]), unix.SIGKILL))
		soon(t, "everything goes on", goes)
		// The capture goes on too, and says so.
		h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 && !t.Progress.Quiesced })
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("kill both", func(t *testing.T) {
		id := h.start(r)
		h.held(id, still)
		guard := s.PID(guards()[0])
		must(t, errors.Join(unix.Kill(guard, unix.SIGKILL), unix.Kill(s.PID(systemd.TaskUnit(id)), unix.SIGKILL)))
		soon(t, "everything goes on", goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
		soon(t, "everything goes on", goes)
	})
	t.Run("too long", func(t *testing.T) {
		long := r
		q := *r.Quiesce
		q.Limit = task.Span(3 * time.Second)
		long.Quiesce = &q
		before := len(s.Calls())
		id := h.start(long)
		soon(t, "everything stands still and goes on", func() bool {
			calls := s.Calls()[before:]
			order := []int{
				slices.Index(calls, "StopUnit app.service"), slices.Index(calls, "FreezeUnit db.service"),
				slices.Index(calls, "ThawUnit db.service"), slices.Index(calls, "StartUnit app.service"),
			}
			return slices.IsSorted(order) && order[0] >= 0
		})
		soon(t, "everything goes on", goes)
		h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 && !t.Progress.Quiesced && !t.State.Ended() })
		if _, err := h.client.Pause(t.Context(), id); err != nil {
			t.Errorf("pausing when nothing stands still any more: %v", err)
		}
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
	})
	t.Run("all goes well", func(t *testing.T) {
		before := len(s.Calls())
		well := r
		well.Limits = fast()
		id := h.start(well)
		if got := h.await(id, "ended", ended); got.State != task.Complete || got.Warnings != 0 {
			t.Fatalf("%+v %+v", got, got.Error)
		}
		if !goes() {
			t.Error("something stands still")
		}
		soon(t, "shutdown is allowed again", func() bool { return len(s.Held()) == 0 })
		calls := s.Calls()[before:]
		at := func(call string) int { return slices.Index(calls, call) }
		published := slices.IndexFunc(calls, func(c string) bool {
			return strings.HasPrefix(c, "Inhibit shutdown:sleep|Instar|publishing web|block")
		})
		released := slices.IndexFunc(calls, func(c string) bool { return strings.HasPrefix(c, "released shutdown:sleep|Instar") })
		order := []int{at("StopUnit app.service"), at("FreezeUnit db.service"), at("ThawUnit db.service"), at("StartUnit app.service"), published, released}
		if !slices.IsSorted(order) || order[0] < 0 || at("StartUnit none.service") >= 0 {
			t.Errorf("%v in %q", order, calls)
		}
	})
	t.Run("not what it writes to", func(t *testing.T) {
		bad := r
		bad.Quiesce = &task.Quiesce{Filesystems: []string{"/"}}
		if got := h.await(h.start(bad), "ended", ended); got.State != task.Failed || !strings.Contains(got.Error.Message, "is not frozen") {
			t.Errorf("%+v %+v", got, got.Error)
		}
	})
	if left, err := filepath.Glob(filepath.Join(h.top, "run/quiesce/*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestStandstillWithoutSystemd: two processes watch over each other, and the
// agent over both.
func TestStandstillWithoutSystemd(t *testing.T) {
	t.Parallel() // it waits most of the time
	data := loopfs.Make(t, "ext4", 200<<20)
	h := newHost(t, "--launcher", "child")
	fill(t, data)
	r := task.Request{Volume: data, Limits: slow(), Quiesce: &task.Quiesce{Filesystems: []string{data}}}
	still := func() bool { return frozen(t, data) }
	goes := func() bool { return !frozen(t, data) }
	for _, kill := range [][]string{{"work"}, {"guard"}} {
		id := h.start(r)
		h.held(id, still)
		for _, pid := range h.processes("agent", kill[0]) {
			must(t, unix.Kill(pid, unix.SIGKILL))
		}
		soon(t, "go on after a kill of "+kill[0], goes)
		_, err := h.client.Cancel(t.Context(), id)
		must(t, err)
		h.await(id, "ended", ended)
	}
	// Longer than ten seconds nothing is frozen, however slow the capture is.
	id := h.start(r)
	h.held(id, still)
	begun := time.Now()
	for still() {
		time.Sleep(20 * time.Millisecond)
	}
	if took := time.Since(begun); took > time.Minute { // for minutes without that limit
		t.Errorf("frozen for %s", took)
	}
	h.await(id, "warned", func(t task.Task) bool { return t.Warnings > 0 })
	_, err := h.client.Cancel(t.Context(), id)
	must(t, err)
	h.await(id, "ended", ended)
	// All of them are killed: the next agent lets it go.
	id = h.start(r)
	h.held(id, still)
	h.cmd.Process.Signal(unix.SIGSTOP)
	for _, pid := range append(h.processes("agent", "guard"), h.processes("agent", "work")...) {
		must(t, unix.Kill(pid, unix.SIGKILL))
	}
	h.kill()
	h.run()
	soon(t, "go on after a restart", goes)
	_, err = h.client.Cancel(t.Context(), id)
	must(t, err)
	h.await(id, "ended", ended)
}
