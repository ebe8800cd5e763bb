package kernels_test

import (
	"testing"

	"github.com/instar-image/instar/initrd/kernels"
)

func TestCompareReleases(t *testing.T) {
	sorted := []string{
		"", "5.10.0-9-amd64", "5.10.0-28-amd64", "6.1.0-2-amd64", "6.1.0-9-cloud-amd64", "6.1.0-18-amd64", "6.1.0-56-amd64",
		"6.1.0-056-cloud", "6.1.0-56-cloud-amd64", "6.1.9", "6.1.10", "6.10", "6.12~rc1-amd64", "6.12", "6.12-amd64", "6.12.1", "6.12.1+deb13", "10.0.0",
	}
	for i, a := range sorted {
		for j, b := range sorted {
			if c := kernels.CompareReleases(a, b); (c < 0) != (i < j) || (c == 0) != (i == j) {
				t.Errorf("%q and %q: %d", a, b, c)
			}
		}
	}
}

func FuzzCompareReleases(f *testing.F) {
	f.Add("6.1.0-9", "6.1.0-10")
	f.Add("a01", "a1")
	f.Add("6.12~rc1", "6.12")
	f.Fuzz(func(t *testing.T, a, b string) {
		ab, ba := kernels.CompareReleases(a, b), kernels.CompareReleases(b, a)
		if (ab < 0) != (ba > 0) || (ab == 0) != (ba == 0) {
			t.Errorf("%q and %q: %d and %d", a, b, ab, ba)
		}
	})
}
