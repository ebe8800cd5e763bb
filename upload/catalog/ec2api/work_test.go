package ec2api

import (
	"fmt"
	"testing"
	"time"
)

// TestWaits: a copy that fails waits longer each time, an hour at most, and others
// are not kept from their turn.
func TestWaits(t *testing.T) {
	var w waits
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	ready := func(ids ...string) string {
		var l []job
		for _, id := range ids {
			l = append(l, job{id: id})
		}
		var out []string
		for _, j := range w.ready(l, now) {
			out = append(out, j.id)
		}
		return fmt.Sprint(out)
	}
	for i, minutes := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		w.failed("bad", now)
		if got := ready("bad", "good"); got != "[good]" {
			t.Errorf("failure %d: ready are %s", i, got)
		}
		now = now.Add(minutes*time.Minute - 1)
		if got := ready("bad", "good"); got != "[good]" {
			t.Errorf("failure %d: ready too early are %s", i, got)
		}
		now = now.Add(1)
		if got := ready("bad", "good"); got != "[bad good]" {
			t.Errorf("failure %d: ready after %d minutes are %s", i, minutes, got)
		}
	}
	w.failed("bad", now)
	w.done("bad")
	if got := ready("bad"); got != "[bad]" {
		t.Errorf("what is done waits: %s", got)
	}
	w.failed("bad", now)
	ready("good") // it is no copy on its way any more
	if len(w.m) != 0 {
		t.Errorf("kept is %v", w.m)
	}
}
