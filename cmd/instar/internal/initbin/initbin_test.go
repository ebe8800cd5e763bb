package initbin

import (
	"errors"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"testing"
)

// TestFile holds in both builds: with the init, which must then be an
// executable, and without it.
func TestFile(t *testing.T) {
	_, statErr := fs.Stat(bin, "bin/instar-init-"+runtime.GOARCH+".gz")
	f, path, err := File()
	if statErr != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("without an init: %v, want fs.ErrNotExist", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil || !strings.HasPrefix(string(data), "\x7fELF") {
		t.Errorf("%s: %v, begins with %.4q", path, err, data)
	}
	f.Close()
	if _, err := os.Stat(path); err == nil {
		t.Errorf("%s is still there after the file was closed", path)
	}
}
