package boot_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/instar-image/instar/initrd/boot"
	"github.com/instar-image/instar/initrd/internal/qemutest"
)

// TestBootKexec goes on with the kernel in the image.
func TestBootKexec(t *testing.T) {
	t.Parallel()
	kernel, file := buildInitrd(t, boot.Config{Fail: boot.PowerOff, Patience: 5, User: "alice"})
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	named := regexp.QuoteMeta(release)
	_, unpacked := qemutest.Kernel(t)
	disk := smallRoot(t, func(dir string) {
		must(t, os.Mkdir(filepath.Join(dir, "boot"), 0o755))
		data, err := os.ReadFile(kernel)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "boot", "vmlinuz-"+release), data, 0o600))
		must(t, os.WriteFile(filepath.Join(dir, "boot", "vmlinuz-5.10.0-99-older"), []byte("no kernel"), 0o600))
		modules := filepath.Join(dir, "lib/modules", release)
		must(t, os.MkdirAll(modules, 0o755))
		if out, err := exec.Command("sh", "-c", `cd "$1/lib/modules/$3" && cp -r --parents modules.builtin modules.order kernel/drivers/virtio kernel/drivers/block/virtio_blk.ko* "$2" && depmod -b "$4" "$3"`,
			"sh", unpacked, modules, release, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	})
	c := newCloud("i-1")
	key := sshKey(t)
	c.tree["meta-data/public-keys/"] = "0=laptop"
	c.tree["meta-data/public-keys/0/openssh-key"] = key
	c.tree["user-data"] = "#cloud-config\nwrite_files: [ { path: /etc/ran, content: \"x\\n\", append: true } ]\n"
	guest := qemutest.Guest{
		Kernel: kernel, Initrd: file, Args: append(qemutest.UserNet(), qemutest.Disk(disk)...),
		Append: c.param(t) + `instar.kexec instar.append="marked by=append"`,
	}
	out := qemutest.Run(t, guest, nil)
	inOrder(t, out, `kernel `+named, `metadata: instance i-1, 1 SSH keys`, `root: /dev/vda`, `kexec: the image's kernel `+named+`, [1-9]\d* modules: `,
		`kernel `+named, `modules: [1-9]\d* loaded`, `network: none`, `metadata: instance i-1, as the initrd before this one was told`, `root: /dev/vda`, `inject: hostname host-i-1`, `GUEST done`)
	cmdline := guestLines(out, "/proc/cmdline")
	if strings.Contains(cmdline, "instar.") || !strings.Contains(cmdline, "console=ttyS0 no_timer_check quiet") || !strings.HasSuffix(cmdline, "root=UUID=11111111-2222-3333-4444-555555555555 marked by=append") {
		t.Errorf("the image's kernel has the parameters %q", cmdline)
	}
	if got := guestLines(out, "/home/alice/.ssh/authorized_keys"); got != key {
		t.Errorf("authorized_keys: %s", got)
	}
	if !strings.Contains(out, "GUEST user data: instar: running part 1") {
		t.Errorf("user data did not run:\n%s", out)
	}

	for _, c := range []struct{ kexec, want string }{
		{"6.0.0-none", `FAILED kexec: the image has no /boot/vmlinuz-6\.0\.0-none to kexec`},
		{"5.10.0-99-older", `FAILED kexec: loading the image's kernel 5\.10\.0-99-older: exec format error`},
	} {
		guest.Append = newCloud("i-1").param(t) + "instar.kexec=" + c.kexec
		inOrder(t, qemutest.Run(t, guest, nil), c.want, `powering off`)
	}
}
