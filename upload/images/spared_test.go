package images_test

import (
	"strings"
	"testing"
	"time"

	"github.com/instar-image/instar/upload/images"
)

// gate stops an actor in front of its first operation that matches.
type gate struct {
	match   func(op) bool
	reached chan struct{}
	open    chan struct{}
	passed  bool
}

func newGate(match func(op) bool) *gate {
	return &gate{match: match, reached: make(chan struct{}), open: make(chan struct{})}
}

// through makes an actor pass gates, one behind the other.
func through(m *mem, gates ...*gate) *actor {
	return &actor{mem: m, before: func(o op) error {
		for _, g := range gates {
			if g.passed {
				continue
			}
			if g.match(o) {
				g.passed = true
				close(g.reached)
				<-g.open
			}
			break
		}
		return nil
	}}
}

// TestSparedListStays: a collector sleeps between reading the manifests and
// deleting; meanwhile an image that uses what it will delete is put, and another
// collector spares that. Were the list of condemned objects deleted now, the
// image's creator would find it gone and everything there, and publish.
func TestSparedListStays(t *testing.T) {
	w := &raceWorld{people: newPeople(t), m: newMem(), acked: map[string][]string{}, gone: map[string]bool{}}
	must(t, w.take(t.Context(), &actor{mem: w.m}, "other", words("m n o")))
	w.leave(t, "web", words("x y z"))
	w.m.pass(2 * time.Hour)

	puts := newGate(func(o op) bool { return o.name == "put" && strings.Contains(o.key, "/manifests/") })
	looks := newGate(func(o op) bool { return o.name == "list" && o.key == "gc/" })
	creator := make(chan error, 1)
	go func() { creator <- w.take(t.Context(), through(w.m, puts, looks), "web", words("x y z")) }()
	<-puts.reached
	must(t, w.collect(t.Context(), &actor{mem: w.m}, 1, false)) // condemns

	deletes := newGate(func(o op) bool { return o.name == "delete" && strings.HasPrefix(o.key, "packs/") })
	sleeper := make(chan error, 1)
	go func() { sleeper <- w.collect(t.Context(), through(w.m, deletes), 1, false) }()
	<-deletes.reached
	close(puts.open)
	<-looks.reached
	s := w.open(t, &actor{mem: w.m}, "")
	r, err := s.GC(t.Context(), images.GCOptions{Grace: -1})
	if err != nil || len(r.Spared) == 0 {
		t.Fatalf("nothing was spared: %+v, %v", r, err)
	}
	close(looks.open)
	must(t, <-creator)
	close(deletes.open)
	must(t, <-sleeper)
	w.sound(t)
}
