package launch

import (
	"errors"
	"testing"
)

// TestGuarded: no ticket is given where other users of this machine can ask.
func TestGuarded(t *testing.T) {
	refused := errors.New("seccomp is not permitted")
	if err := (&Options{Image: &Image{}}).guarded(refused); !errors.Is(err, refused) {
		t.Errorf("an image without redirection: %v", err)
	}
	for _, err := range []error{(&Options{Image: &Image{}}).guarded(nil), (&Options{}).guarded(refused)} {
		if err != nil {
			t.Error(err)
		}
	}
}
