package images_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// modelVersion is a version as the model has it.
type modelVersion struct {
	name   chunked.Name
	blocks []string
}

// modelWorld is a store and what should be in it.
type modelWorld struct {
	*people
	t      testing.TB
	m      *mem
	a      *actor
	s      *images.Store
	rng    *rand.Rand
	images map[string][]modelVersion // oldest first
	seen   map[string]int64          // sequences
	log    []string
}

func (w *modelWorld) fatal(format string, a ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nafter %s", fmt.Sprintf(format, a...), strings.Join(w.log, "; "))
}

func (w *modelWorld) pickImage() string { return []string{"web", "mail", "db"}[w.rng.IntN(3)] }

func (w *modelWorld) pick() (string, int, bool) {
	image := w.pickImage()
	if n := len(w.images[image]); n > 0 {
		return image, w.rng.IntN(n), true
	}
	return image, 0, false
}

// blocks changes the newest version a little, or draws new content.
func (w *modelWorld) blocks(image string) []string {
	l := make([]string, 4+w.rng.IntN(9))
	if n := len(w.images[image]); n > 0 && w.rng.IntN(4) > 0 {
		l = slices.Clone(w.images[image][n-1].blocks)
		for range w.rng.IntN(3) {
			l[w.rng.IntN(len(l))] = fmt.Sprint("w", w.rng.IntN(40))
		}
		return l
	}
	for i := range l {
		l[i] = fmt.Sprint("w", w.rng.IntN(40))
	}
	return l
}

func (w *modelWorld) step() {
	ctx := w.t.Context()
	switch k := w.rng.IntN(100); {
	case k < 30:
		image := w.pickImage()
		blocks := w.blocks(image)
		w.log = append(w.log, fmt.Sprint("capture ", image, blocks))
		v, err := w.captureUntil(ctx, w.s, image, blocks)
		if err != nil {
			w.fatal("capture: %v", err)
		}
		if v.Sequence != w.seen[image]+1 {
			w.fatal("sequence %d, want %d", v.Sequence, w.seen[image]+1)
		}
		w.seen[image]++
		w.images[image] = append(w.images[image], modelVersion{v.Name, blocks})
	case k < 40:
		image, i, ok := w.pick()
		if !ok {
			return
		}
		w.log = append(w.log, fmt.Sprint("delete version ", i, " of ", image))
		if _, err := w.s.Delete(ctx, image+"@"+w.images[image][i].name.String(), w.signer); err != nil {
			w.fatal("delete: %v", err)
		}
		w.seen[image]++
		w.images[image] = slices.Delete(w.images[image], i, i+1)
	case k < 43:
		image := w.pickImage()
		w.log = append(w.log, "delete "+image)
		_, err := w.s.Delete(ctx, image, w.signer)
		if w.seen[image] == 0 && errors.Is(err, images.ErrNoImage) {
			return
		}
		if err != nil {
			w.fatal("delete: %v", err)
		}
		if len(w.images[image]) > 0 {
			w.seen[image]++
		}
		delete(w.images, image)
	case k < 58:
		o := images.GCOptions{Grace: []time.Duration{-1, -1, time.Hour, 0}[w.rng.IntN(4)], DryRun: w.rng.IntN(8) == 0}
		if w.rng.IntN(3) == 0 {
			d, err := w.s.Domain(ctx, "main", images.DomainOptions{})
			if errors.Is(err, images.ErrNoImage) {
				return
			}
			if err != nil {
				w.fatal("domain: %v", err)
			}
			o.Repack = &images.Repack{Below: 1 + w.rng.IntN(100), Domain: d, Owner: w.owner}
		}
		w.log = append(w.log, fmt.Sprintf("gc grace %s repack %v", o.Grace, o.Repack != nil))
		before := w.m.snapshot()
		r, err := w.s.GC(ctx, o)
		if err != nil {
			w.fatal("gc: %v", err)
		}
		if o.DryRun && len(before) != len(w.m.keys("")) {
			w.fatal("a dry run changed something")
		}
		if n := len(slices.Concat(w.images["web"], w.images["mail"], w.images["db"])); r.Manifests < n {
			w.fatal("gc counts %d manifests, there are %d, and perhaps some of killed captures", r.Manifests, n)
		}
	case k < 66:
		w.log = append(w.log, "time")
		w.m.pass(time.Duration(w.rng.IntN(30)) * time.Hour)
	case k < 70:
		// A capture that is killed somewhere.
		image := w.pickImage()
		blocks := w.blocks(image)
		kill := &killer{n: w.rng.IntN(40), stored: w.rng.IntN(2) == 0}
		w.log = append(w.log, fmt.Sprint("killed capture ", image, blocks, " at ", kill.n))
		s, err := images.Open(kill.attach(&actor{mem: w.m}), w.options(""))
		if err != nil {
			w.fatal("open: %v", err)
		}
		if _, err := w.capture(ctx, s, image, blocks); err == nil && !kill.fired {
			w.resync(image, blocks)
		} else if kill.fired {
			w.resync(image, blocks)
		}
	case k < 73:
		w.log = append(w.log, "verify")
		r, err := w.s.Verify(ctx, images.VerifyOptions{ReadData: w.rng.IntN(2) == 0})
		if err != nil || !r.Sound() {
			w.fatal("verify: %+v, %v", r, err)
		}
	case k < 75:
		w.log = append(w.log, "scrub")
		r, err := w.s.Scrub(ctx, nil)
		if err != nil {
			w.fatal("scrub: %v", err)
		}
		// What a killed capture left may be hurt by a pack that was lost.
		for image, l := range w.images {
			for _, v := range l {
				if hurt := r.Hurt[image+"@"+v.name.String()]; hurt != nil {
					w.fatal("scrub: %s is hurt by %q", image, hurt)
				}
			}
		}
	case k < 77:
		packs := w.m.keys("packs/")
		var disks []images.Candidate
		for _, l := range w.images {
			for _, v := range l {
				disks = append(disks, images.Disk{ReaderAt: strings.NewReader(string(text(v.blocks)))})
			}
		}
		if len(packs) == 0 || len(disks) == 0 {
			return
		}
		key := packs[w.rng.IntN(len(packs))]
		w.log = append(w.log, "lose "+key+" and repair")
		w.m.change(key, func([]byte) []byte { return nil })
		d, err := w.s.Domain(ctx, "main", images.DomainOptions{})
		if err != nil {
			w.fatal("domain: %v", err)
		}
		if r, err := w.s.Repair(ctx, images.RepairOptions{Domain: d, Owner: w.owner, Candidates: disks}); err != nil || len(r.Lost) > 0 {
			w.fatal("repair: %+v, %v", r, err)
		}
	case k < 80:
		l, err := w.s.List(ctx, "")
		if err != nil {
			w.fatal("list: %v", err)
		}
		for _, i := range l {
			var got, want []chunked.Name
			for _, v := range i.Versions {
				if !v.Unpublished {
					got = append(got, v.Name)
				}
			}
			for _, v := range w.images[i.Image] {
				want = append(want, v.name)
			}
			slices.Reverse(want)
			if !slices.Equal(got, want) || i.Sequence != w.seen[i.Image] {
				w.fatal("list has %v of %s, want %v", got, i.Image, want)
			}
		}
	default:
		image, i, ok := w.pick()
		if !ok {
			_, err := w.s.Resolve(ctx, image, images.ResolveOptions{})
			if !errors.Is(err, images.ErrNoImage) && !errors.Is(err, chunked.ErrDeleted) {
				w.fatal("%s: %v", image, err)
			}
			return
		}
		v := w.images[image][i]
		got, err := read(ctx, w.s, image+"@"+v.name.String())
		if err != nil || string(got) != string(text(v.blocks)) {
			w.fatal("version %d of %s: %v", i, image, err)
		}
	}
}

// resync asks the store what became of a capture that was killed.
func (w *modelWorld) resync(image string, blocks []string) {
	l, err := w.s.List(w.t.Context(), image)
	if err != nil {
		w.fatal("list: %v", err)
	}
	for _, i := range l {
		if i.Image == image && i.Sequence == w.seen[image]+1 {
			w.seen[image]++
			w.images[image] = append(w.images[image], modelVersion{i.Versions[0].Name, blocks})
		}
	}
}

// TestModel plays random operations against a model of what should be there.
func TestModel(t *testing.T) {
	t.Parallel()
	p := newPeople(t)
	sequences, length := many(100, 10_000), 100
	for seed := range uint64(sequences) {
		m := newMem()
		a := &actor{mem: m}
		w := &modelWorld{
			people: p, t: t, m: m, a: a, s: p.open(t, a, ""), rng: rand.New(rand.NewPCG(seed, 4)),
			images: map[string][]modelVersion{}, seen: map[string]int64{},
		}
		w.log = append(w.log, fmt.Sprint("seed ", seed))
		for range length {
			w.step()
		}
		for image, l := range w.images {
			for _, v := range l {
				mustRead(t, w.s, image+"@"+v.name.String(), v.blocks)
			}
		}
	}
	t.Logf("%d operations", sequences*length)
}

// TestMonth lets thirty days pass by the store's clock, with three hosts whose
// own clocks are two hours off, step back and leap; captures take most of a day,
// collections go on all the time.
func TestMonth(t *testing.T) {
	p := newPeople(t)
	months := many(2, 100)
	for seed := range uint64(months) {
		rng := rand.New(rand.NewPCG(seed, 5))
		w := &raceWorld{people: p, m: newMem(), acked: map[string][]string{}, gone: map[string]bool{}}
		end := epoch.Add(30 * 24 * time.Hour)
		counts := make([]int, 3)
		host := func(i int) func(*actor) {
			skew := []time.Duration{-2 * time.Hour, 0, 2 * time.Hour}[i]
			random := rand.New(rand.NewPCG(seed, uint64(10+i)))
			return func(a *actor) {
				for w.m.now().Before(end) {
					o := w.options("")
					o.Local = func() time.Time {
						if random.IntN(10) == 0 {
							skew += time.Duration(random.IntN(121)-60) * time.Minute // steps and leaps
						}
						skew = max(-2*time.Hour, min(skew, 2*time.Hour))
						return w.m.now().Add(skew)
					}
					s, err := images.Open(a, o)
					if err != nil {
						t.Error(err)
						return
					}
					if i == 2 {
						_, err = s.GC(t.Context(), images.GCOptions{})
						if _, err2 := s.GC(t.Context(), images.GCOptions{}); err == nil {
							err = err2
						}
					} else {
						image := []string{"web", "mail"}[i]
						var blocks []string
						for range 6 {
							blocks = append(blocks, fmt.Sprint("w", random.IntN(30)))
						}
						var v *images.Published
						if v, err = w.captureUntil(t.Context(), s, image, blocks); err == nil {
							w.acked[image+"@"+v.Name.String()] = blocks
							if random.IntN(3) == 0 {
								ref := image + "@" + v.Name.String()
								w.gone[ref] = true
								_, err = s.Delete(t.Context(), ref, w.signer)
							}
						}
					}
					if err != nil {
						t.Errorf("host %d: %v", i, err)
						return
					}
					counts[i]++
				}
			}
		}
		play(w.m, func(_ int, ready []int) int {
			w.m.pass(time.Duration(rng.IntN(15)) * time.Minute)
			return rng.IntN(len(ready))
		}, host(0), host(1), host(2))
		w.readAll(t)
		w.m.pass(48 * time.Hour)
		w.sound(t)
		if counts[0] < 5 || counts[1] < 5 || counts[2] < 5 {
			t.Errorf("only %v captures and collections", counts)
		}
		t.Logf("%v captures and collections, %d versions kept", counts, len(w.acked)-len(w.gone))
	}
}

// TestLists lets lists of the store be out of order, repeat, and lag behind by
// up to half a minute: nothing in use is ever collected.
func TestLists(t *testing.T) {
	p := newPeople(t)
	n := many(150, 5000)
	for seed := range uint64(n) {
		rng := rand.New(rand.NewPCG(seed, 6))
		w := &raceWorld{people: p, m: newMem(), acked: map[string][]string{}, gone: map[string]bool{}}
		var past []map[string]memObject
		lying := func() *actor {
			return &actor{mem: w.m, pages: func(prefix string, l []upload.Object) []upload.Object {
				switch rng.IntN(4) {
				case 0:
					rng.Shuffle(len(l), func(i, j int) { l[i], l[j] = l[j], l[i] })
				case 1:
					l = append(l, l...)
				case 2:
					// As it was up to 30 seconds ago.
					if len(past) > 0 {
						old := past[rng.IntN(len(past))]
						l = nil
						for k, o := range old {
							if strings.HasPrefix(k, prefix) {
								l = append(l, o.object(k))
							}
						}
					}
				}
				return l
			}}
		}
		must(t, w.take(t.Context(), &actor{mem: w.m}, "web", words("a b c d e f")))
		w.leave(t, "web", words("x y z p q r"))
		w.m.pass(25 * time.Hour)
		actors := []func(*actor){
			func(a *actor) {
				a.pages = lying().pages
				if err := w.take(t.Context(), a, "web", words("x y z p q r")); err != nil && !errors.Is(err, images.ErrCollected) {
					t.Errorf("capture: %v", err)
				}
			},
			func(a *actor) {
				a.pages = lying().pages
				s := p.open(t, a, "")
				for range 3 {
					if _, err := s.GC(t.Context(), images.GCOptions{}); err != nil && !errors.Is(err, images.ErrBlocked) {
						t.Errorf("collection: %v", err)
					}
					w.m.pass(25 * time.Hour)
					past = nil
				}
			},
		}
		play(w.m, func(_ int, ready []int) int {
			past = append(past, w.m.snapshot())
			if len(past) > 10 {
				past = past[1:]
			}
			w.m.pass(3 * time.Second)
			return rng.IntN(len(ready))
		}, actors...)
		w.readAll(t)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("%d stores with lists that lie", n)
}
