package zoo_test

import (
	"slices"
	"testing"

	"github.com/instar-image/instar/test/compare"
	"github.com/instar-image/instar/test/loopfs"
	"github.com/instar-image/instar/test/zoo"
)

// TestZoo proves that the zoo can be made on every filesystem, that it holds
// at least 60 kinds, that only named kinds are skipped, and that the
// comparers see a copy made by rsync as equal.
func TestZoo(t *testing.T) {
	mayLack := map[string][]string{"xfs": {"symlink-4095-bytes", "device-number-largest"}}
	for _, fstype := range loopfs.Types() {
		t.Run(fstype, func(t *testing.T) {
			dir := loopfs.Make(t, fstype, 3<<30)
			made, skipped, err := zoo.Create(dir, fstype)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := zoo.Release(dir); err != nil {
					t.Error(err)
				}
			})
			if len(made) < 60 {
				t.Errorf("%d kinds, want at least 60", len(made))
			}
			if !slices.Equal(skipped, mayLack[fstype]) {
				t.Errorf("skipped %q, want %q", skipped, mayLack[fstype])
			}
			tree, err := compare.Walk(dir, compare.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if len(tree) < 105_000 {
				t.Errorf("%d names, want more than 105,000", len(tree))
			}
			diffs, err := compare.Tools(dir, dir, zoo.Far, "over-4GiB")
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range diffs {
				t.Error(d)
			}
		})
	}
}
