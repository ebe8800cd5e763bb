package boot

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
	"github.com/instar-image/instar/upload/images"
)

// TestRecorder records reads and has them read as "instar images trace --put" does.
func TestRecorder(t *testing.T) {
	const size = 100_000
	name := filepath.Join(t.TempDir(), "instar", "trace.json")
	r, err := newRecorder(name, size)
	check(t, err)
	for _, read := range [][2]int64{{8192, 4096}, {12288, 100}, {0, 1}, {4096, 8192}, {98304, 4096}, {200_000, 4096}, {0, 20_000}} {
		r.read(read[0], read[1])
	}
	if _, err := r.write(); err != nil {
		t.Fatal(err)
	}
	r.read(50_000, 1) // is not recorded any more
	data, err := os.ReadFile(name)
	check(t, err)
	got, err := images.ReadRanges(bytes.NewReader(data))
	check(t, err)
	want := []chunked.Range{{Position: 8192, Length: 8192}, {Position: 0, Length: 8192}, {Position: 98304, Length: size - 98304}, {Position: 16384, Length: 4096}}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
