package boot

import (
	"math"
	"slices"
	"testing"

	"github.com/instar-image/instar/bundle/chunked"
)

// TestFirstOf: a trace that names everything has no more fetched ahead than one
// of a boot.
func TestFirstOf(t *testing.T) {
	in := []chunked.Range{{Position: 8, Length: 10}, {Position: 100, Length: 5}, {Position: 0, Length: math.MaxInt64}, {Position: 7, Length: 1}}
	for left, want := range map[int64][]chunked.Range{
		0:   nil,
		4:   {{Position: 8, Length: 4}},
		10:  {{Position: 8, Length: 10}},
		100: {{Position: 8, Length: 10}, {Position: 100, Length: 5}, {Position: 0, Length: 85}},
	} {
		if got := slices.Collect(firstOf(in, left)); !slices.Equal(got, want) {
			t.Errorf("%d bytes: %v, want %v", left, got, want)
		}
	}
}
