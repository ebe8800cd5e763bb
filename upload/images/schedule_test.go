package images_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/keys"
	"github.com/instar-image/instar/upload/images"
)

func evidence() bool { return os.Getenv("INSTAR_EVIDENCE") != "" }

// many is how often something is tried: always, or for the record.
func many(always, record int) int {
	switch {
	case raced:
		return (always + 24) / 25
	case evidence():
		return record
	}
	return always
}

// play lets actors run one at a time, each stopped in front of every operation
// on the store; next says who goes on (an index into ready). It returns who
// went, operation by operation.
func play(m *mem, next func(step int, ready []int) int, fs ...func(*actor)) []int {
	type state struct {
		at      chan struct{} // it stands in front of an operation
		goOn    chan struct{}
		done    chan struct{}
		waiting bool
	}
	all := make([]*state, len(fs))
	for i, f := range fs {
		s := &state{at: make(chan struct{}), goOn: make(chan struct{}), done: make(chan struct{})}
		all[i] = s
		a := &actor{mem: m, before: func(op) error { s.at <- struct{}{}; <-s.goOn; return nil }}
		go func() { defer close(s.done); f(a) }()
	}
	settle := func(s *state) {
		select {
		case <-s.at:
			s.waiting = true
		case <-s.done:
			s.waiting = false
		}
	}
	for _, s := range all {
		settle(s)
	}
	var went []int
	for {
		var ready []int
		for i, s := range all {
			if s.waiting {
				ready = append(ready, i)
			}
		}
		if len(ready) == 0 {
			return went
		}
		i := ready[next(len(went), ready)]
		went = append(went, i)
		all[i].waiting = false
		all[i].goOn <- struct{}{}
		settle(all[i])
	}
}

// race is a store and what goes on in it at the same time.
type race struct {
	name   string
	setup  func(t testing.TB, w *raceWorld)
	actors []func(ctx context.Context, w *raceWorld, a *actor) error

	world   *raceWorld // as setup left it
	objects map[string]memObject
}

// raceWorld is the store of one race, and what was acknowledged.
type raceWorld struct {
	*people
	m     *mem
	acked map[string][]string // reference with the version's whole name: its blocks
	gone  map[string]bool     // references that somebody deletes
	extra *keys.Identity      // somebody else's
}

// copy is the same world over another store, which holds objects.
func (w *raceWorld) copy(objects map[string]memObject) *raceWorld {
	c := *w
	c.m, c.acked = newMem(), maps.Clone(w.acked)
	c.m.restore(objects)
	c.m.writes, c.m.clock = 1000, w.m.now()
	return &c
}

func (w *raceWorld) take(ctx context.Context, a *actor, image string, blocks []string) error {
	s, err := images.Open(a, w.options(""))
	if err != nil {
		return err
	}
	v, err := w.captureUntil(ctx, s, image, blocks)
	if err == nil {
		w.acked[image+"@"+v.Name.String()] = blocks
	}
	return err
}

// collect runs garbage collection without grace, so that what is condemned goes
// the next time.
func (w *raceWorld) collect(ctx context.Context, a *actor, times int, repack bool) error {
	s, err := images.Open(a, w.options(""))
	if err != nil {
		return err
	}
	o := images.GCOptions{Grace: -1}
	if repack {
		d, err := s.Domain(ctx, "main", images.DomainOptions{})
		if err != nil {
			return err
		}
		o.Repack = &images.Repack{Below: 90, Domain: d, Owner: w.owner}
	}
	for range times {
		if _, err := s.GC(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

func (w *raceWorld) remove(ctx context.Context, a *actor, ref string) error {
	s, err := images.Open(a, w.options(""))
	if err != nil {
		return err
	}
	_, err = s.Delete(ctx, ref, w.signer)
	return err
}

// leave makes what a capture that was interrupted leaves: packs and index.
func (w *raceWorld) leave(t testing.TB, image string, blocks []string) {
	t.Helper()
	a := &actor{mem: w.m, before: func(o op) error {
		if o.name == "put" && strings.Contains(o.key, "/keys/") {
			return errors.New("interrupted")
		}
		return nil
	}}
	if err := w.take(t.Context(), a, image, blocks); err == nil {
		t.Fatal("the capture was not interrupted")
	}
	for _, k := range w.m.keys("runs/") {
		w.m.change(k, func([]byte) []byte { return nil })
	}
}

// sound makes sure that all that was acknowledged, and all that a head lists,
// reads back, now and after more collections, which leave no garbage.
func (w *raceWorld) sound(t testing.TB) {
	t.Helper()
	w.readAll(t)
	w.m.pass(2 * time.Hour)
	if err := w.collect(t.Context(), &actor{mem: w.m}, 3, false); err != nil {
		t.Fatalf("collections afterwards: %v", err)
	}
	w.readAll(t)
	if l := w.m.keys("runs/"); len(l) != 0 {
		t.Fatalf("left: %q", l)
	}
	s := w.open(t, &actor{mem: w.m}, "")
	r, err := s.GC(t.Context(), images.GCOptions{Grace: -1, DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	// A list stays as long as something it names is in use.
	if len(r.Condemned) != 0 || len(r.Withdrawn) != 0 || len(r.Swept) != 0 {
		t.Fatalf("garbage is left: %+v", r)
	}
}

func (w *raceWorld) readAll(t testing.TB) {
	t.Helper()
	must(t, w.check(t))
}

// check reads all that was acknowledged, and all that a head lists.
func (w *raceWorld) check(t testing.TB) error {
	t.Helper()
	s := w.open(t, &actor{mem: w.m}, "")
	listed := map[string]bool{}
	l, err := s.List(t.Context(), "")
	if err != nil {
		return err
	}
	for _, i := range l {
		for _, v := range i.Versions {
			if v.Unpublished {
				continue
			}
			ref := i.Image + "@" + v.Name.String()
			listed[ref] = true
			got, err := read(t.Context(), s, ref)
			if err != nil {
				return fmt.Errorf("a head lists %s: %w", ref, err)
			}
			if blocks, ok := w.acked[ref]; ok && !bytes.Equal(got, text(blocks)) {
				return fmt.Errorf("%s has other content", ref)
			}
		}
	}
	for ref := range w.acked {
		if !w.gone[ref] && !listed[ref] {
			return fmt.Errorf("%s was acknowledged, and no head lists it", ref)
		}
	}
	return nil
}

// begin sets the race up; each run begins from there.
func (r *race) begin(t testing.TB, p *people) {
	w := &raceWorld{people: p, m: newMem(), acked: map[string][]string{}, gone: map[string]bool{}}
	r.setup(t, w)
	r.world, r.objects = w, w.m.snapshot()
}

// run plays the race once.
func (r *race) run(t testing.TB, next func(step int, ready []int) int) []int {
	t.Helper()
	w := r.world.copy(r.objects)
	errs := make([]error, len(r.actors))
	var fs []func(*actor)
	for i, f := range r.actors {
		fs = append(fs, func(a *actor) { errs[i] = f(t.Context(), w, a) })
	}
	went := play(w.m, next, fs...)
	for i, err := range errs {
		if err != nil {
			t.Fatalf("actor %d: %v\nschedule %v", i, err, went)
		}
	}
	defer func() {
		if t.Failed() {
			t.Logf("schedule %v", went)
		}
	}()
	w.sound(t)
	return went
}

func races() []race {
	doomed := words("x y z p q r")
	return []race{
		{
			// The footers of an interrupted capture say what the collector is
			// about to delete.
			name: "own footers",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "other", words("m n o")))
				w.leave(t, "web", doomed)
			},
			actors: []func(context.Context, *raceWorld, *actor) error{
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.take(ctx, a, "web", doomed) },
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, false) },
			},
		},
		{
			// The parent is deleted, and its packs collected, under the child.
			name: "parent deleted",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "web", words("a b c d e f g h i")))
				for ref := range w.acked {
					w.gone[ref] = true
				}
			},
			actors: []func(context.Context, *raceWorld, *actor) error{
				func(ctx context.Context, w *raceWorld, a *actor) error {
					return w.take(ctx, a, "web", words("a b c d e f g h j"))
				},
				func(ctx context.Context, w *raceWorld, a *actor) error {
					for ref := range w.gone {
						if err := w.remove(ctx, a, ref); err != nil {
							return err
						}
					}
					return w.collect(ctx, a, 2, false)
				},
			},
		},
		{
			// Packs are rewritten without the chunks the new image finds in them.
			name: "repack",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "web", words("a b c d e f g h i")))
				must(t, w.take(t.Context(), &actor{mem: w.m}, "web", words("a X c d Y f g Z i")))
				for ref, blocks := range w.acked {
					if blocks[1] == "b" {
						must(t, w.remove(t.Context(), &actor{mem: w.m}, ref))
						w.gone[ref] = true
					}
				}
			},
			actors: []func(context.Context, *raceWorld, *actor) error{
				func(ctx context.Context, w *raceWorld, a *actor) error {
					return w.take(ctx, a, "web", words("a b c d e f g h k"))
				},
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, true) },
			},
		},
		{
			name: "two collectors",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "other", words("m n o")))
				w.leave(t, "web", doomed)
			},
			actors: []func(context.Context, *raceWorld, *actor) error{
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.take(ctx, a, "web", doomed) },
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, false) },
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, true) },
			},
		},
		{
			name: "two creators, one name",
			setup: func(t testing.TB, w *raceWorld) {
				must(t, w.take(t.Context(), &actor{mem: w.m}, "web", words("a b c d e f")))
				w.leave(t, "web", doomed)
			},
			actors: []func(context.Context, *raceWorld, *actor) error{
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.take(ctx, a, "web", doomed) },
				func(ctx context.Context, w *raceWorld, a *actor) error {
					return w.take(ctx, a, "web", words("x y z a b c"))
				},
				func(ctx context.Context, w *raceWorld, a *actor) error { return w.collect(ctx, a, 2, true) },
			},
		},
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestGCRacesCreators plays captures against collections, which have no grace
// here: all schedules in which one of two actors is interrupted once for the
// other to run to its end (and, with INSTAR_EVIDENCE, to be interrupted in
// turn), and random ones.
func TestGCRacesCreators(t *testing.T) {
	t.Parallel()
	p := newPeople(t)
	total := 0
	for _, r := range races() {
		t.Run(r.name, func(t *testing.T) {
			r.begin(t, p)
			n := 0
			if len(r.actors) == 2 && !raced {
				n = r.switches(t)
			}
			random := many(450, 20_000)
			for seed := range uint64(random) {
				rng := rand.New(rand.NewPCG(seed, 1))
				stay := rng.Float64()
				last := -1
				r.run(t, func(_ int, ready []int) int {
					if i := slices.Index(ready, last); i >= 0 && rng.Float64() < stay {
						return i
					}
					i := rng.IntN(len(ready))
					last = ready[i]
					return i
				})
				n++
			}
			t.Logf("%d schedules", n)
			total += n
		})
	}
	t.Logf("%d schedules in all", total)
	if !t.Failed() && !raced && total < 2000 {
		t.Errorf("only %d schedules", total)
	}
}

// switches plays all schedules in which a few runs of operations alternate, and
// the last actor runs to its end.
func (r *race) switches(t *testing.T) int {
	depth := 1
	if evidence() {
		depth = 2
	}
	n := 0
	var deeper func(first int, lengths []int) bool
	// It returns false if the last run was cut short by its actor's end: longer
	// ones are the same.
	deeper = func(first int, lengths []int) bool {
		full := true
		if len(lengths) > 0 {
			run, left := 0, lengths[0] // which run it is, and its operations still to come
			r.run(t, func(_ int, ready []int) int {
				if run < len(lengths) && left == 0 {
					if run++; run < len(lengths) {
						left = lengths[run]
					}
				}
				who := (first + run) % 2
				i := slices.Index(ready, who)
				left--
				full = full && (i >= 0 || run >= len(lengths))
				return max(i, 0)
			})
			n++
			full = full && (run >= len(lengths) || left == 0 && run == len(lengths)-1)
		}
		if !full {
			return false
		}
		if len(lengths) == depth {
			return true
		}
		for l := 1; deeper(first, append(slices.Clone(lengths), l)); l++ {
			if l > 500 {
				t.Fatal("an actor does not end")
			}
		}
		return true
	}
	for first := range 2 {
		deeper(first, nil)
	}
	return n
}
