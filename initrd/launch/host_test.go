package launch

import (
	"slices"
	"testing"
)

func TestCompareVersions(t *testing.T) {
	sorted := []string{"5.10.0-9-amd64", "5.10.0-10-amd64", "6.1.0-9-cloud-amd64", "6.1.0-56-amd64", "6.1.0-56-cloud-amd64", "6.12.1", "6.12.1+deb13"}
	shuffled := slices.Clone(sorted)
	slices.Reverse(shuffled)
	slices.SortFunc(shuffled, compareVersions)
	if !slices.Equal(shuffled, sorted) {
		t.Errorf("sorted as %q", shuffled)
	}
}

func FuzzCompareVersions(f *testing.F) {
	f.Add("6.1.0-9", "6.1.0-10")
	f.Add("a01", "a1")
	f.Fuzz(func(t *testing.T, a, b string) {
		ab, ba := compareVersions(a, b), compareVersions(b, a)
		if (ab < 0) != (ba > 0) || (ab == 0) != (ba == 0) {
			t.Errorf("%q and %q: %d and %d", a, b, ab, ba)
		}
	})
}
