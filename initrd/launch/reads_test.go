package launch

import (
	"math"
	"slices"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
)

// TestReads: the first reads in their order, each block once, within the disk.
func TestReads(t *testing.T) {
	r := NewReads(100 * readBlock)
	for _, x := range [][2]int64{{5 * readBlock, 10}, {6*readBlock + 100, readBlock}, {0, 3}, {5 * readBlock, 4 * readBlock}, {-1, 5}, {9, 0}, {127 * readBlock, math.MaxInt64 - 1<<30}, {50 * readBlock, 1}} {
		r.Note(x[0], x[1])
	}
	want := []chunked.Range{
		{Position: 5 * readBlock, Length: 3 * readBlock},
		{Position: 0, Length: readBlock},
		{Position: 8 * readBlock, Length: readBlock},
		{Position: 127 * readBlock, Length: readBlock},
		{Position: 50 * readBlock, Length: readBlock},
	}
	if got := r.End(); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	r.Note(20*readBlock, 1)
	if got := r.End(); len(got) != len(want) {
		t.Error("it notes after the end")
	}
}
