package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/instar-image/instar/initrd/kernels"
)

// hostArch is this machine's architecture as QEMU and EC2 call it.
func hostArch() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}

// ErrNoKernel is wrapped where an image has no kernel to launch it with.
var ErrNoKernel = errors.New("the image has no kernel of its own")

// KernelOf copies the newest kernel of a disk image, and its modules, to dir:
// an ext2, ext3 or ext4 filesystem without a partition table, which debugfs
// (e2fsprogs) reads without mounting. It returns the kernel's file, its
// release, and the root directory in which lib/modules/RELEASE is.
func KernelOf(ctx context.Context, disk, dir string) (kernel, release, root string, err error) {
	names, err := debugfsList(ctx, disk, "/boot")
	if err != nil {
		return "", "", "", err
	}
	var releases []string
	for _, n := range names {
		if r, ok := strings.CutPrefix(n, "vmlinuz-"); ok && plainName(r) {
			releases = append(releases, r)
		}
	}
	if len(releases) == 0 {
		return "", "", "", fmt.Errorf("%w: no /boot/vmlinuz-RELEASE in %s", ErrNoKernel, disk)
	}
	slices.SortFunc(releases, kernels.CompareReleases)
	release = releases[len(releases)-1]
	kernel = filepath.Join(dir, "vmlinuz")
	if err := debugfs(ctx, disk, fmt.Sprintf("dump /boot/vmlinuz-%s %s", release, kernel)); err != nil {
		return "", "", "", err
	}
	if st, err := os.Stat(kernel); err != nil || st.Size() == 0 {
		return "", "", "", fmt.Errorf("%w: /boot/vmlinuz-%s of %s cannot be read", ErrNoKernel, release, disk)
	}
	root = filepath.Join(dir, "root")
	modules := filepath.Join(root, "lib", "modules")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return "", "", "", err
	}
	for _, lib := range []string{"/usr/lib/modules/", "/lib/modules/"} {
		if err := debugfs(ctx, disk, fmt.Sprintf("rdump %s%s %s", lib, release, modules)); err != nil {
			return "", "", "", err
		}
		if _, err := os.Stat(filepath.Join(modules, release, "kernel")); err == nil {
			return kernel, release, root, nil
		}
	}
	return "", "", "", fmt.Errorf("%w: the modules of %s are not in %s", ErrNoKernel, release, disk)
}

// LoginOf is the user whom cloud-init in a disk image, as [KernelOf] takes it,
// lets in; "" if the image has no cloud-init that is enabled, or it says none.
func LoginOf(ctx context.Context, disk string) (string, error) {
	for _, f := range []struct {
		dir, name string
		want      bool
	}{{"/usr/bin", "cloud-init", true}, {"/etc/cloud", "cloud-init.disabled", false}} {
		names, err := debugfsList(ctx, disk, f.dir)
		if err != nil || slices.Contains(names, f.name) != f.want {
			return "", err
		}
	}
	text, err := debugfsOutput(ctx, disk, "cat /etc/cloud/cloud.cfg")
	if err != nil {
		return "", err
	}
	var config struct {
		System struct {
			User struct {
				Name string `yaml:"name"`
			} `yaml:"default_user"`
		} `yaml:"system_info"`
	}
	// A file that cannot be understood, or a name that is none, says nothing.
	if len(text) > 1<<20 || yaml.Unmarshal([]byte(text), &config) != nil || !plainName(config.System.User.Name) {
		return "", nil
	}
	return config.System.User.Name, nil
}

// plainName tells whether a name can stand in a debugfs request.
func plainName(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._+~-", r))
	}) < 0
}

func debugfs(ctx context.Context, disk, request string) error {
	_, err := debugfsOutput(ctx, disk, request)
	return err
}

func debugfsOutput(ctx context.Context, disk, request string) (string, error) {
	// Debian has it in /sbin, which is not on everybody's path.
	program, err := exec.LookPath("debugfs")
	if err != nil {
		program = "/sbin/debugfs"
	}
	out, err := exec.CommandContext(ctx, program, "-R", request, disk).Output()
	if err != nil {
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		if errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("%w: install e2fsprogs", err)
		}
		return "", fmt.Errorf("looking into %s: %w", disk, err)
	}
	return string(out), nil
}

// debugfsList lists a directory: lines "/inode/mode/uid/gid/name/size/".
func debugfsList(ctx context.Context, disk, dir string) ([]string, error) {
	out, err := debugfsOutput(ctx, disk, "ls -p "+dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(out) {
		if f := strings.Split(strings.TrimSpace(line), "/"); len(f) >= 7 {
			names = append(names, f[5])
		}
	}
	return names, nil
}
