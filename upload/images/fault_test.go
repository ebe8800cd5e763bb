package images_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-image/instar/upload/images"
)

// errKilled ends an actor: every operation after it fails as well.
var errKilled = errors.New("killed")

// killer lets operation n of an actor be its last: not carried out, or carried
// out without an answer.
type killer struct {
	mu     sync.Mutex
	n      int
	stored bool // the answer is lost
	once   bool // only that operation fails; the actor lives on
	count  int
	fired  bool
	at     op
}

func (k *killer) attach(a *actor) *actor {
	a.before = func(o op) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.fired && !k.once {
			return errKilled
		}
		if k.count == k.n && !k.stored {
			k.fired, k.at = true, o
			k.count++
			return errKilled
		}
		if !k.stored {
			k.count++
		}
		return nil
	}
	a.after = func(o op) error {
		k.mu.Lock()
		defer k.mu.Unlock()
		if !k.stored {
			return nil
		}
		if k.count++; k.count-1 == k.n {
			k.fired, k.at = true, o
			return errLost
		}
		return nil
	}
	return a
}

// task is something that is interrupted and done again.
type task struct {
	name  string
	setup func(t testing.TB, w *raceWorld)
	run   func(ctx context.Context, w *raceWorld, a *actor) error
	after func(t testing.TB, w *raceWorld)
}

func tasks() []task {
	one, two := words("a b c d e f g h i"), words("a b c X e f g Y i")
	gone := func(t testing.TB, w *raceWorld) {
		for ref, blocks := range w.acked {
			if blocks[3] == "d" {
				w.gone[ref] = true
			}
		}
	}
	versions := func(t testing.TB, w *raceWorld) {
		a := &actor{mem: w.m}
		must(t, w.take(t.Context(), a, "web", one))
		must(t, w.take(t.Context(), a, "web", two))
	}
	return []task{
		{
			name:  "first capture",
			setup: func(testing.TB, *raceWorld) {},
			run:   func(ctx context.Context, w *raceWorld, a *actor) error { return w.take(ctx, a, "web", one) },
		},
		{
			name:  "capture with a parent",
			setup: func(t testing.TB, w *raceWorld) { must(t, w.take(t.Context(), &actor{mem: w.m}, "web", one)) },
			run:   func(ctx context.Context, w *raceWorld, a *actor) error { return w.take(ctx, a, "web", two) },
		},
		{
			name: "delete a version",
			setup: func(t testing.TB, w *raceWorld) {
				versions(t, w)
				gone(t, w)
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error {
				for ref := range w.gone {
					err := w.remove(ctx, a, ref)
					if errors.Is(err, images.ErrNoImage) {
						err = nil // it was done when the answer was lost
					}
					if err != nil {
						return err
					}
				}
				return nil
			},
			after: func(t testing.TB, w *raceWorld) {
				for ref := range w.gone {
					if _, err := w.open(t, &actor{mem: w.m}, "").Resolve(t.Context(), ref, images.ResolveOptions{}); !errors.Is(err, images.ErrNoImage) {
						t.Fatalf("it is still there: %v", err)
					}
				}
			},
		},
		{
			name: "delete an image",
			setup: func(t testing.TB, w *raceWorld) {
				versions(t, w)
				for ref := range w.acked {
					w.gone[ref] = true
				}
				must(t, w.take(t.Context(), &actor{mem: w.m}, "mail", one))
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error { return w.remove(ctx, a, "web") },
			after: func(t testing.TB, w *raceWorld) {
				if l := w.m.keys("images/web/manifests/"); len(l) != 0 {
					t.Fatalf("left: %q", l)
				}
				// A key whose manifest is gone is the collector's business.
				must(t, w.collect(t.Context(), &actor{mem: w.m}, 2, false))
				if l := w.m.keys("images/web/"); len(l) != 1 {
					t.Fatalf("left: %q", l)
				}
			},
		},
		{
			name: "collect",
			setup: func(t testing.TB, w *raceWorld) {
				versions(t, w)
				gone(t, w)
				for ref := range w.gone {
					must(t, w.remove(t.Context(), &actor{mem: w.m}, ref))
				}
				w.leave(t, "web", words("l m n o p q"))
				w.m.pass(2 * time.Hour)
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, false) },
			after: func(t testing.TB, w *raceWorld) {
				if l := w.m.keys("gc/"); len(l) != 0 {
					t.Fatalf("left: %q", l)
				}
			},
		},
		{
			name: "repack",
			setup: func(t testing.TB, w *raceWorld) {
				versions(t, w)
				gone(t, w)
				for ref := range w.gone {
					must(t, w.remove(t.Context(), &actor{mem: w.m}, ref))
				}
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 3, true) },
			after: func(t testing.TB, w *raceWorld) {
				if len(w.m.keys("moved/")) == 0 {
					t.Fatal("nothing was repacked")
				}
			},
		},
		{
			name: "repair",
			setup: func(t testing.TB, w *raceWorld) {
				versions(t, w)
				for i, k := range w.m.keys("packs/") {
					w.m.change(k, func(b []byte) []byte {
						if i == 0 {
							return nil
						}
						b[20] ^= 1
						return b
					})
				}
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error {
				s, err := images.Open(a, w.options(""))
				if err != nil {
					return err
				}
				d, err := s.Domain(ctx, "main", images.DomainOptions{})
				if err != nil {
					return err
				}
				r, err := s.Repair(ctx, images.RepairOptions{Domain: d, Owner: w.owner, Candidates: []images.Candidate{
					images.Disk{ReaderAt: strings.NewReader(string(text(one)))},
					images.Disk{ReaderAt: strings.NewReader(string(text(two)))},
				}})
				if err == nil && len(r.Lost) > 0 {
					err = fmt.Errorf("lost: %+v", r.Lost)
				}
				return err
			},
			after: func(t testing.TB, w *raceWorld) {
				for ref, blocks := range w.acked {
					mustRead(t, w.open(t, &actor{mem: w.m}, ""), ref, blocks)
				}
			},
		},
		{
			name: "recipients and creators",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "web", one))
				w.extra = newIdentity(t)
			},
			run: func(ctx context.Context, w *raceWorld, a *actor) error {
				s, err := images.Open(a, w.options(""))
				if err != nil {
					return err
				}
				img, err := s.Resolve(ctx, "web", images.ResolveOptions{})
				if err != nil {
					return err
				}
				if err := img.AddRecipient(ctx, w.extra.Recipient()); err != nil {
					return err
				}
				return s.AddCreator(ctx, "main", w.extra.Recipient(), w.signer)
			},
			after: func(t testing.TB, w *raceWorld) {
				p := *w.people
				p.id = w.extra
				mustRead(t, p.open(t, &actor{mem: w.m}, ""), "web", one)
				if _, err := p.open(t, &actor{mem: w.m}, "").Domain(t.Context(), "main", images.DomainOptions{}); err != nil {
					t.Fatal(err)
				}
			},
		},
	}
}

// TestKilledAtEveryOperation kills every task at every operation on the store:
// before it is carried out, and behind it, when the answer is lost; and lets
// every operation fail once, for the task to go on. Each time, what was
// acknowledged reads back, the task is run again, and all is well.
func TestKilledAtEveryOperation(t *testing.T) {
	t.Parallel()
	p := newPeople(t)
	total := 0
	for _, tk := range tasks() {
		t.Run(tk.name, func(t *testing.T) {
			base := &raceWorld{people: p, m: newMem(), acked: map[string][]string{}, gone: map[string]bool{}}
			tk.setup(t, base)
			good := base.m.snapshot()
			points := 0
			step := 1
			if raced {
				step = 25
			}
			for mode := range 4 {
				for n := 0; ; n += step {
					w := base.copy(good)
					k := &killer{n: n, stored: mode&1 == 1, once: mode&2 == 2}
					err := tk.run(t.Context(), w, k.attach(&actor{mem: w.m}))
					if !k.fired {
						if err != nil {
							t.Fatalf("without a fault: %v", err)
						}
						break
					}
					points++
					fail := func(what string, err error) {
						t.Helper()
						t.Fatalf("mode %d, operation %d (%s %s): %s: %v", mode, n, k.at.name, k.at.key, what, err)
					}
					if tk.name != "repair" {
						if err := w.check(t); err != nil {
							fail("afterwards", err)
						}
					}
					if err := tk.run(t.Context(), w, &actor{mem: w.m}); err != nil {
						fail("run again", err)
					}
					if tk.after != nil {
						tk.after(t, w)
					}
					if err := w.check(t); err != nil {
						fail("after it was run again", err)
					}
					if points%7 == 0 || evidence() {
						w.m.pass(2 * time.Hour)
						w.sound(t)
					}
					if t.Failed() {
						fail("", nil)
					}
				}
			}
			t.Logf("%d points", points)
			total += points
		})
	}
	t.Logf("%d points in all", total)
	if !t.Failed() && !raced && total < 1000 {
		t.Errorf("only %d points", total)
	}
}
