package boot_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/instar-image/instar/bundle/disk"
	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

// TestBootLazyNewer boots a root that comes while it runs by a kernel that sets
// up block devices in the way of Linux 6.11 and later: its server is killed and
// goes on, it is rebooted by force half-way, and the next boot sees it through to the
// disk.
func TestBootLazyNewer(t *testing.T) {
	t.Parallel()
	kernel, root := qemutest.KernelFor(t, qemutest.Newer, "amd64")
	c := newLazyCloud(t, disk.None)
	params := c.serve(t, "i-1") + "guest.lazy guest.kill=1 "
	target := dirty(t)
	guest := qemutest.Guest{
		Kernel: kernel, Initrd: buildInitrdFor(t, root, boot.Config{Fail: boot.PowerOff, Patience: 5}), Args: append(qemutest.UserNet(), qemutest.Disk(target)...),
		Append: params + "guest.write=first:300 guest.reboot",
	}
	c.pace(300 << 10)
	out := qemutest.Run(t, guest, nil)
	inOrder(t, out, `kernel 6\.`, `root: web [0-9a-f]{8}, 64 MiB, for /dev/vda`, `root: /dev/mapper/instar-root, ext4 11111111`, `root: grown`,
		`GUEST killed: goes on after .*, <nil>`, `GUEST write: <nil>`, `GUEST rebooting after`)
	if strings.Contains(out, "GUEST processes") {
		t.Fatalf("all was there already:\n%s", out)
	}
	guest.Append = params + "guest.use guest.sum=/big guest.complete guest.write=after:300 guest.log"
	out = qemutest.Run(t, guest, when("GUEST use of all", func() { c.pace(0) }))
	inOrder(t, out, `going on where the last boot ended`, `GUEST killed: goes on after .*, <nil>`, regexp.QuoteMeta(bigSum()), `GUEST processes: map\[\]`, `GUEST write: <nil>`, `GUEST done`)
	modest(t, out)
	if got := guestLines(out, "/proc/sys/kernel/printk_devkmsg"); got != "on" {
		t.Errorf("what the server says is in the kernel's log: %s", got)
	}
	for _, bad := range []string{"I/O error", "WARNING:", "Oops", "blocked for more than"} {
		if strings.Contains(out, bad) {
			t.Errorf("the console has %q:\n%s", bad, out)
		}
	}
	c.whole(t, target, map[string]int{"var/lib/first": 300, "var/lib/after": 300, "var/lib/late": 10})
	if c.complete != 1 {
		t.Errorf("the ticket was completed %d times", c.complete)
	}
}
