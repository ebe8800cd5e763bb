package quiesce

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestThawingSideBySide: a filesystem whose device does not answer keeps no
// other from going on, and does not hold up what comes after.
func TestThawingSideBySide(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	thawed := make(chan string, 3)
	expired := make(chan time.Time)
	go func() { // both that can be are
		<-thawed
		<-thawed
		close(expired)
	}()
	err := sideBySide([]string{"/b", "/hangs", "/c"}, expired, func(m string) error {
		if m == "/hangs" {
			<-hang
		}
		thawed <- m
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "thawing /hangs: no answer") {
		t.Errorf("error %v", err)
	}
	bad := errors.New("bad")
	if err := sideBySide([]string{"/x"}, nil, func(string) error { return bad }); !errors.Is(err, bad) {
		t.Errorf("error %v", err)
	}
	if err := sideBySide([]string{"/x", "/y"}, nil, func(string) error { return nil }); err != nil {
		t.Error(err)
	}
}
