package lease_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/lease"
)

func open(t *testing.T) upload.Store {
	t.Helper()
	s, err := upload.OpenDir(t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func at(d time.Duration) func() time.Time { return func() time.Time { return noon.Add(d) } }

func take(t *testing.T, s upload.Store, holder string, now func() time.Time) *lease.Lease {
	t.Helper()
	l, err := lease.Take(t.Context(), s, "w", holder, now)
	if err != nil {
		t.Fatalf("%s takes it: %v", holder, err)
	}
	return l
}

func held(t *testing.T, s upload.Store, now func() time.Time) {
	t.Helper()
	if _, err := lease.Take(t.Context(), s, "w", "a stranger", now); !errors.Is(err, lease.ErrTaken) {
		t.Errorf("a lease that is held is given to a stranger: %v", err)
	}
}

// TestGivenBack: what is given back is anybody's at once, and no work is under way.
func TestGivenBack(t *testing.T) {
	s := open(t)
	a := take(t, s, "a", at(0))
	held(t, s, at(time.Minute))
	a.Note(40)
	if err := a.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, err := lease.Percent(t.Context(), s, "w"); n != 0 || err != nil {
		t.Errorf("it is at %d, %v", n, err)
	}
	take(t, s, "b", at(0))
	held(t, s, at(time.Minute))
}

// TestLateRelease: who stood still until another took the lease leaves it to him.
func TestLateRelease(t *testing.T) {
	s := open(t)
	a := take(t, s, "a", at(0))
	b := take(t, s, "b", at(3*time.Minute))
	if err := a.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	held(t, s, at(3*time.Minute))
	if err := b.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	take(t, s, "c", at(3*time.Minute))
}

// TestLost: Keep ends the work of who lost his lease, and he does not give back what
// another has.
func TestLost(t *testing.T) {
	s := open(t)
	synctest.Test(t, func(t *testing.T) {
		a := take(t, s, "a", time.Now)
		time.Sleep(3 * time.Minute)
		take(t, s, "b", time.Now)
		working, lost := context.WithCancel(t.Context())
		defer lost()
		a.Note(1)
		a.Keep(working, lost)
		if working.Err() == nil {
			t.Error("the work goes on")
		}
		if err := a.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		held(t, s, time.Now)
	})
}

// TestKept: a lease that is kept is nobody else's.
func TestKept(t *testing.T) {
	s := open(t)
	synctest.Test(t, func(t *testing.T) {
		a := take(t, s, "a", time.Now)
		working, stop := context.WithCancel(t.Context())
		go a.Keep(working, stop)
		time.Sleep(time.Hour)
		synctest.Wait()
		held(t, s, time.Now)
		a.Note(40)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n, err := lease.Percent(t.Context(), s, "w"); n != 40 || err != nil {
			t.Errorf("it is at %d, %v", n, err)
		}
		stop()
		if err := a.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		take(t, s, "b", time.Now)
	})
}

// mute is a store whose answers to puts are lost.
type mute struct {
	upload.Store
	on bool
}

func (m *mute) Put(ctx context.Context, key string, body io.ReaderAt, size int64, o upload.PutOptions) (upload.Object, error) {
	put, err := m.Store.Put(ctx, key, body, size, o)
	if err == nil && m.on {
		m.on = false
		return upload.Object{}, &upload.Error{Op: "put", Store: "mute", Key: key, Kind: upload.ErrUnreachable}
	}
	return put, err
}

// TestLostAnswer: a renewal that was carried out and not answered does not keep
// the lease from being given back.
func TestLostAnswer(t *testing.T) {
	s := &mute{Store: open(t)}
	synctest.Test(t, func(t *testing.T) {
		a := take(t, s, "a", time.Now)
		working, stop := context.WithCancel(t.Context())
		a.Note(7)
		s.on = true
		go a.Keep(working, stop)
		time.Sleep(7 * time.Second)
		synctest.Wait()
		stop()
		synctest.Wait()
		if s.on {
			t.Fatal("it was not renewed")
		}
		if err := a.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		take(t, s, "b", time.Now)
	})
}
