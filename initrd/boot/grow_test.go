package boot

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/test/loopfs"
)

// TestGrow grows filesystems, mounted, to their device. ext4, which wants the
// right to exceed quotas too, is grown in the machines of TestBootTicket.
func TestGrow(t *testing.T) {
	const before, after = 320 << 20, 640 << 20
	for _, c := range []struct {
		kind string
		mkfs []string
	}{
		{"xfs", []string{"mkfs.xfs", "-q", "-f"}},
		{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}},
	} {
		image := filepath.Join(t.TempDir(), c.kind)
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, before); err != nil {
			t.Fatal(err)
		}
		loopfs.Run(t, c.mkfs[0], append(c.mkfs[1:], image)...)
		if err := os.Truncate(image, after); err != nil {
			t.Fatal(err)
		}
		dir := loopfs.Mount(t, image)
		size := func() uint64 {
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err != nil {
				t.Fatal(err)
			}
			return st.Blocks * uint64(st.Bsize)
		}
		small := size()
		for range 2 { // the second time there is nothing to do
			if err := growTo(c.kind, dir, after); err != nil {
				t.Errorf("%s: %v", c.kind, err)
			}
		}
		if large := size(); large < small+(after-before)*8/10 {
			t.Errorf("%s: %d bytes became %d", c.kind, small, large)
		}
	}
	if err := growTo("ext2fs", t.TempDir(), after); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("an unknown filesystem: %v", err)
	}
}
