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

// TestInTurn: who asked for much is not served before who asked for little.
func TestInTurn(t *testing.T) {
	var jobs []job
	for _, s := range []string{"a1", "a2", "a3", "b1", "a4", "c1", "c2", "b2"} {
		jobs = append(jobs, job{id: s, owner: s[:1]})
	}
	var got []string
	for _, j := range inTurn(jobs) {
		got = append(got, j.id)
	}
	if s := fmt.Sprint(got); s != "[a1 b1 c1 a2 c2 b2 a3 a4]" {
		t.Errorf("the turns are %s", s)
	}
}
