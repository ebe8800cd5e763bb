package launch_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/initrd/internal/qemutest"
	"github.com/instar-image/instar/test/freeport"
)

// emptyDisk is a disk with an empty filesystem, and the options to boot the
// test kernel with it.
func emptyDisk(t testing.TB) []string {
	t.Helper()
	disk := filepath.Join(t.TempDir(), "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	must(t, os.Truncate(disk, 16<<20))
	shell(t, `/sbin/mkfs.ext4 -q -F "$1"`, disk)
	kernel, root := qemutest.Kernel(t)
	return []string{"--disk", disk, "--kernel-file", kernel, "--modules", root, "--accel", "tcg", "--memory", "512"}
}

// answering waits until the port is as it should be: QEMU listens on it, or
// nobody does.
func answering(t testing.TB, port string, want bool) {
	t.Helper()
	for end := time.Now().Add(qemutest.Limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			c.Close()
		}
		if (err == nil) == want {
			return
		}
	}
	t.Fatalf("port %s: listened on %v, want %v", port, !want, want)
}

// TestLaunchEnds ends instar launch, and the machine is gone: with everything
// else if there was time for it.
func TestLaunchEnds(t *testing.T) {
	for _, c := range []struct {
		signal syscall.Signal
		status int
		left   int
	}{{syscall.SIGINT, 255, 0}, {syscall.SIGTERM, 255, 0}, {syscall.SIGKILL, -1, 1}} {
		t.Run(c.signal.String(), func(t *testing.T) {
			scratch, port := t.TempDir(), strconv.Itoa(freeport.Port(t))
			g := launch(t, nil, append(emptyDisk(t), "--port", port, "--scratch", scratch, "--hostname", "h", "--user-data", "/etc/hostname")...)
			answering(t, port, true)
			must(t, g.cmd.Process.Signal(c.signal))
			err := g.end()
			answering(t, port, false)
			if got := g.cmd.ProcessState.ExitCode(); got != c.status {
				t.Errorf("exit status %d (%v), want %d\n%s", got, err, c.status, g.stderr)
			}
			if left, err := filepath.Glob(filepath.Join(scratch, "*")); err != nil || len(left) != c.left {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}

const withoutRedirection = "INSTAR_LAUNCH_PLAIN"

// becomeUnredirected replaces this process by a program that is not allowed to
// have its children's calls answered, as in some containers.
func becomeUnredirected(argv []string) error {
	runtime.LockOSThread()
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SECCOMP, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

// TestLaunchMetadata boots the initrd as far as metadata, where connections can
// be redirected and where not: that is said then.
func TestLaunchMetadata(t *testing.T) {
	args := append([]string{"launch", "--append", "instar.stop=metadata", "--user-data", "/etc/hostname", "--hostname", "h", "--scratch", t.TempDir()}, emptyDisk(t)...)
	const warning = "not at 169.254.169.254"
	for _, c := range []struct {
		name, want string
		plain      bool
	}{
		{"redirected", `metadata for the machine at http://169\.254\.169\.254\n`, false},
		{"not redirected", `metadata for the machine at http://10\.0\.2\.2:\d+\n`, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cmd := exec.CommandContext(t.Context(), instar(t), args...)
			if c.plain {
				cmd = exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{instar(t)}, args...)...)
				cmd.Env = append(os.Environ(), withoutRedirection+"=1")
			}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range []string{c.want, `metadata: instance i-launch`, `stopped after metadata`} {
				if !regexp.MustCompile(want).Match(out) {
					t.Errorf("lacks %q:\n%s", want, out)
				}
			}
			if strings.Contains(string(out), warning) != c.plain {
				t.Errorf("warning %q: %v, want %v\n%s", warning, !c.plain, c.plain, out)
			}
		})
	}
}

// TestLaunchPanic boots what the kernel cannot start: it is said, and over.
func TestLaunchPanic(t *testing.T) {
	t.Parallel()
	_, errs, status := run(t, nil, append([]string{"launch", "--append", "rdinit=/none", "--user-data", "/etc/hostname", "--hostname", "h", "--scratch", t.TempDir()}, emptyDisk(t)...)...)
	if want := "the machine's kernel panicked: VFS: Unable to mount root fs"; status == 0 || !strings.Contains(errs, want) {
		t.Errorf("exit status %d, want %q in\n%s", status, want, errs)
	}
}

// smallRoot makes a disk, in dir, with a root whose system shows some files and
// runs the user data, and returns the disk and a file of user data that leaves
// a line in /etc/ran each time it runs.
func smallRoot(t testing.TB, arch, dir string) (disk, userData string) {
	t.Helper()
	shell(t, `set -e
cd "$1"
mkdir -p root/dev root/proc root/sys root/run root/tmp root/sbin root/etc/ssh root/var/lib root/root root/lib/systemd
cp "$2" root/lib/systemd/systemd
ln -s /lib/systemd/systemd root/sbin/init
echo root:x:0:0::/root:/bin/sh >root/etc/passwd
truncate -s 64M disk
/sbin/mkfs.ext4 -q -F -d root disk`, dir, qemutest.BuildProgramFor(t, arch, "../boot/testdata/guestinit"))
	userData = filepath.Join(dir, "user-data")
	must(t, os.WriteFile(userData, []byte("#cloud-config\nwrite_files: [ { path: /etc/ran, content: \"x\\n\", append: true } ]\n"), 0o600))
	return filepath.Join(dir, "disk"), userData
}

// TestLaunchARM64 boots a small root by an arm64 kernel, initrd and init.
func TestLaunchARM64(t *testing.T) {
	t.Parallel()
	kernel, modules := qemutest.KernelFor(t, qemutest.Stable, "arm64")
	init := qemutest.BuildProgramFor(t, "arm64", "github.com/instar-image/instar/cmd/instar-init")
	disk, userData := smallRoot(t, "arm64", t.TempDir())
	_, pub := sshKey(t)
	out, errs, status := run(t, nil, "launch", "--machine", "aarch64", "--disk", disk, "--kernel-file", kernel, "--modules", modules,
		"--init", init, "--ssh-key", pub, "--user-data", userData, "--hostname", "arm", "--memory", "512", "--scratch", t.TempDir(), "--console")
	for _, want := range []string{
		`instar: \[.*network: eth0 10\.0\.2\.15/24`, `GUEST /etc/hostname: arm\b`, `GUEST user data: instar: running part 1`, `GUEST done`,
	} {
		if status != 0 || !regexp.MustCompile(want).MatchString(errs) {
			t.Fatalf("exit status %d, want %q in\n%s%s", status, want, out, errs)
		}
	}
}

// boots is how often a campaign boots: once, 30 times if $INSTAR_EVIDENCE is
// set, $INSTAR_BOOTS times if that is.
func boots(t testing.TB) int {
	t.Helper()
	if n := os.Getenv("INSTAR_BOOTS"); n != "" {
		k, err := strconv.Atoi(n)
		must(t, err)
		return k
	}
	if os.Getenv("INSTAR_EVIDENCE") != "" {
		return 30
	}
	return 1
}

// TestLaunchPowerCuts cuts the power of a machine at some moment of its first
// boot and boots it again: it comes up, it is one instance, and its user data
// has run at most once, which its journal says.
func TestLaunchPowerCuts(t *testing.T) {
	t.Parallel()
	kernel, modules := qemutest.Kernel(t)
	pristine, userData := smallRoot(t, "amd64", t.TempDir())
	counts := make(map[string]int)
	for n := range boots(t) {
		disk := filepath.Join(t.TempDir(), "disk")
		shell(t, `cp --sparse=always "$1" "$2"`, pristine, disk)
		args := []string{
			"--disk", disk, "--keep", "--kernel-file", kernel, "--modules", modules, "--accel", "tcg", "--memory", "512",
			"--hostname", "h", "--user-data", userData, "--scratch", t.TempDir(), "--console",
		}
		g := launch(t, nil, args...)
		after := time.Duration(1000+rand.IntN(12000)) * time.Millisecond
		cut := time.AfterFunc(after, func() { g.cmd.Process.Kill() })
		whole := g.end() == nil
		cut.Stop()
		released(t, disk)
		_, errs, status := run(t, nil, append([]string{"launch"}, args...)...)
		if status != 0 || !strings.Contains(errs, "GUEST done") {
			t.Fatalf("boot %d, after a cut at %v: exit status %d\n%s\nfirst boot:\n%s", n, after, status, errs, g.stderr)
		}
		// 1: what the journal of the filesystem had to repair.
		shell(t, `/sbin/e2fsck -fp "$1" >/dev/null || [ $? -eq 1 ]`, disk)
		ran := strings.Count(inImage(t, disk, "/etc/ran"), "x")
		state := "not run"
		var begun int
		ids := make(map[string]bool)
		for line := range strings.Lines(inImage(t, disk, "/var/lib/instar/journal")) {
			var r struct{ Step, State, Instance string }
			must(t, json.Unmarshal([]byte(line), &r))
			ids[r.Instance] = true
			if r.Step == "user-data" {
				state = r.State
				if r.State == "started" {
					begun++
				}
			}
		}
		switch {
		case begun != 1 || ran > 1 || len(ids) != 1:
			t.Errorf("cut at %v: user data begun %d times, ran %d times, instances %v", after, begun, ran, ids)
		case state == "finished" && ran != 1, state != "finished" && state != "interrupted":
			t.Errorf("cut at %v: user data ran %d times; the journal says %q", after, ran, state)
		}
		if whole {
			state += ", the first boot was through before the cut"
		}
		counts[state]++
	}
	t.Logf("%d boots cut short and repeated: user data %v", boots(t), counts)
}

// released waits until no machine has a disk any more: one whose instar launch was
// killed is killed as well, and may need a moment to end.
func released(t testing.TB, disk string) {
	t.Helper()
	for end := time.Now().Add(qemutest.Limit); ; time.Sleep(20 * time.Millisecond) {
		files, err := filepath.Glob("/proc/[0-9]*/cmdline")
		must(t, err)
		held := false
		for _, f := range files {
			line, err := os.ReadFile(f)
			held = held || err == nil && strings.Contains(string(line), disk) // else it has just ended
		}
		if !held {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("somebody still has %s", disk)
		}
	}
}

// inImage is a file of an image that is not mounted, "" if it is not there.
func inImage(t testing.TB, disk, name string) string {
	t.Helper()
	out, err := exec.Command("/sbin/debugfs", "-R", "cat "+name, disk).Output()
	must(t, err)
	return string(out)
}
