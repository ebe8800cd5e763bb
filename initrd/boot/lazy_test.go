package boot_test

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/initrd/lazyroot"
)

// lazyInitrd is an initrd with what a lazy root needs.
func lazyInitrd(t testing.TB) (kernel, file string) {
	t.Helper()
	return buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5})
}

// modest checks that the root's server had no more memory than it may.
func modest(t testing.TB, out string) {
	t.Helper()
	m := regexp.MustCompile(`GUEST use of all, KiB: (\d+)`).FindStringSubmatch(out)
	if m == nil {
		t.Error("what the server used is not said")
		return
	}
	if kib, err := strconv.Atoi(m[1]); err != nil || kib == 0 || kib > 48<<10 {
		t.Errorf("the server's processes had %s KiB in memory", m[1])
	}
	t.Logf("the server's processes had %s KiB in memory", m[1])
}

// mounted runs use on the filesystem of an image.
func mounted(t testing.TB, image string, use func(dir string)) {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "ro,loop,noload", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	defer func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	}()
	use(dir)
}

// files are a root's files, with their content.
func files(t testing.TB, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	must(t, filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(name, dir)
		st, err := d.Info()
		if err != nil {
			return err
		}
		found[rel] = st.Mode().String()
		if st.Mode().IsRegular() {
			data, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			found[rel] += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		return nil
	}))
	return found
}

// whole checks that a disk holds the image and what the guest wrote: the
// filesystem is sound, every file of the image that the guest did not change is
// as it was, and what it wrote is there.
func (c *lazyCloud) whole(t testing.TB, target string, wrote map[string]int) {
	t.Helper()
	disk := target
	if c.start > 0 {
		disk = filepath.Join(t.TempDir(), "partition")
		data, err := os.ReadFile(target)
		must(t, err)
		st, err := os.Stat(c.image)
		must(t, err)
		must(t, os.WriteFile(disk, data[c.start:c.start+st.Size()], 0o600))
	}
	if out, err := exec.Command("e2fsck", "-fn", disk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	var before, after map[string]string
	mounted(t, c.image, func(dir string) { before = files(t, dir) })
	mounted(t, disk, func(dir string) {
		after = files(t, dir)
		for name, kib := range wrote {
			st, err := os.Stat(filepath.Join(dir, name))
			if err != nil || st.Size() != int64(kib)*1020 {
				t.Errorf("%s, %d KiB: %v, %v", name, kib, st, err)
			}
		}
	})
	ours := []string{"/etc/", "/var/lib/", "/home/", "/root"}
	for name, want := range before {
		own := false
		for _, o := range ours {
			own = own || strings.HasPrefix(name, o)
		}
		if got := after[name]; got != want && !own {
			t.Errorf("%s is %q, in the image %q", name, got, want)
		}
	}
	if len(before) < 10 {
		t.Errorf("the image has %d files", len(before))
	}
}

// TestBootLazy boots a root that comes while it runs, whose server is killed
// meanwhile, and boots again from what is on the disk, without the store.
func TestBootLazy(t *testing.T) {
	t.Parallel()
	kernel, file := lazyInitrd(t)
	c := newLazyCloud(t, disk.None)
	params := c.serve(t, "i-1")
	target := dirty(t)
	guest := qemutest.Guest{
		Kernel: kernel, Initrd: file, Args: append(qemutest.UserNet(), qemutest.Disk(target)...),
		Append: params + "guest.lazy guest.write=first:300 guest.kill=2 guest.use guest.sum=/big guest.complete guest.write=after:300 guest.log",
	}
	c.pace(300 << 10)
	out := qemutest.Run(t, guest, when("GUEST use of all", func() { c.pace(0) }))
	inOrder(t, out, `root: web [0-9a-f]{8}, 64 MiB, for /dev/vda`, `root: /dev/mapper/instar-root, ext4 11111111`, `root: grown`, `inject: hostname booted`,
		`GUEST write: <nil>`, `GUEST killed: goes on`, `GUEST sum /big: [0-9a-f]{64} <nil>`, `GUEST processes: map\[\]`, `GUEST write: <nil>`, `GUEST done`)
	modest(t, out)
	c.whole(t, target, map[string]int{"var/lib/first": 300, "var/lib/after": 300})
	if c.complete != 1 {
		t.Errorf("the ticket was completed %d times", c.complete)
	}

	// From the disk alone.
	asked := len(c.asked)
	guest.Append = params + "guest.lazy guest.sum=/big"
	out = qemutest.Run(t, guest, nil)
	inOrder(t, out, `all of it was brought to /dev/vda while the system ran: nothing is fetched`, `root: /dev/vda, ext4`, `root: grown`, `GUEST done`)
	out = qemutest.Run(t, guest, nil)
	inOrder(t, out, `it is this instance's already`, `GUEST done`)
	if len(c.asked) != asked {
		t.Errorf("later boots asked the store for %q", c.asked[asked:])
	}
	c.whole(t, target, map[string]int{"var/lib/first": 300, "var/lib/after": 300})
}

// bigSum is what guestinit says of the file that takes time to come.
func bigSum() string {
	data := make([]byte, bigFile)
	rand.NewChaCha8([32]byte{7}).Read(data)
	return fmt.Sprintf("GUEST sum /big: %x <nil>", sha256.Sum256(data))
}

// TestBootLazyCuts has a boot end before the root is all there: by a reboot by force,
// and by power cuts. Each next boot goes on.
func TestBootLazyCuts(t *testing.T) {
	t.Parallel()
	kernel, file := lazyInitrd(t)
	c := newLazyCloud(t, disk.None)
	params := c.serve(t, "i-1") + "guest.lazy guest.write=kept:100 "
	target := dirty(t)
	guest := qemutest.Guest{
		Kernel: kernel, Initrd: file, Args: append(qemutest.UserNet(), qemutest.Disk(target)...),
	}
	cuts := []int64{10, 50, 90}
	if os.Getenv("INSTAR_EVIDENCE") == "" {
		cuts = []int64{20, 80}
	}
	c.pace(300 << 10)
	guest.Append = params + "guest.reboot"
	out := qemutest.Run(t, guest, nil)
	inOrder(t, out, `GUEST write: <nil>`, `GUEST rebooting after`)
	total := int64(bigFile)
	for _, percent := range cuts {
		cut := make(chan struct{})
		var once sync.Once
		wrote := false // c's lock is held
		c.pace(300 << 10)
		c.mu.Lock()
		c.reached = func(served int64) {
			if wrote && served > total*percent/100 {
				once.Do(func() { close(cut) })
			}
		}
		c.mu.Unlock()
		guest.Append = params + "guest.beat guest.complete"
		out = qemutest.RunUntil(t, guest, cut, when("GUEST write: <nil>", func() {
			c.pace(1 << 20)
			c.mu.Lock()
			defer c.mu.Unlock()
			wrote = true
		}))
		inOrder(t, out, `going on where the last boot ended`, `GUEST write: <nil>`)
		if strings.Contains(out, "GUEST processes") {
			t.Fatalf("at %d %% all was there already:\n%s", percent, out)
		}
		f, err := os.Open(target)
		must(t, err)
		st, err := lazyroot.StateOf(f, 96<<20)
		f.Close()
		if err != nil || st.State != lazyroot.Filling || st.Instance != "i-1" {
			t.Errorf("after the cut at %d %%: %+v, %v", percent, st, err)
		}
	}
	c.mu.Lock()
	c.reached = nil
	c.mu.Unlock()
	c.pace(0)
	guest.Append = params + "guest.sum=/big guest.complete guest.log"
	out = qemutest.Run(t, guest, nil)
	inOrder(t, out, `going on where the last boot ended`, regexp.QuoteMeta(bigSum()), `GUEST processes: map\[\]`, `GUEST done`)
	c.whole(t, target, map[string]int{"var/lib/kept": 100, "var/lib/late": 10})
	t.Logf("%d KiB were fetched by %d boots, of an image of %d", c.served>>10, len(cuts)+2, total>>10)
	if c.served > total*3/2 {
		t.Errorf("%d KiB were fetched in all, of an image of %d: what a boot had fetched was fetched again", c.served>>10, total>>10)
	}
}
