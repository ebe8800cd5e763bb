package capture

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/instar-image/instar/bundle/rootfs"
	"github.com/instar-image/instar/initrd"
	"github.com/instar-image/instar/initrd/kernels"
)

// maxKernel bounds a kernel, in bytes.
const maxKernel = 256 << 20

// BootOptions say what travels with an image to boot it.
type BootOptions struct {
	// Init is the executable that becomes the initrd's /init; "": no initrd.
	Init string
	// NoKernel leaves kernel and initrd out.
	NoKernel bool
	// Kernel is the release of the kernel to take where there are several
	// ("6.1.0-18-amd64"); "" is the newest.
	Kernel string
}

// kernel is a kernel of the captured root.
type kernel struct {
	release string // "" if its file's name does not say
	path    string
	modules string // directory with its modules, "" if there are none
}

// findKernel finds the newest kernel in a root, or that of a release: in
// /boot, else where Fedora and Arch keep them, in the directory of its modules.
func findKernel(root fs.FS, release string) (kernel, error) {
	var found []kernel
	add := func(release, path string) {
		if st, err := fs.Stat(root, path); err != nil || !st.Mode().IsRegular() || st.Size() == 0 || st.Size() > maxKernel {
			return
		}
		k := kernel{release: release, path: path}
		for _, base := range []string{"lib/modules", "usr/lib/modules"} {
			if _, err := fs.Stat(root, base+"/"+release+"/kernel"); release != "" && err == nil {
				k.modules = base + "/" + release
				break
			}
		}
		found = append(found, k)
	}
	for _, e := range readDir(root, "boot") {
		for _, prefix := range []string{"vmlinuz-", "vmlinux-", "Image-", "kernel-"} {
			if r, ok := strings.CutPrefix(e.Name(), prefix); ok && !strings.Contains(r, "rescue") {
				add(r, "boot/"+e.Name())
			}
		}
	}
	for _, base := range []string{"lib/modules", "usr/lib/modules"} {
		for _, e := range readDir(root, base) {
			add(e.Name(), base+"/"+e.Name()+"/vmlinuz")
		}
	}
	if len(found) == 0 {
		for _, p := range []string{"boot/vmlinuz", "boot/Image", "vmlinuz"} {
			add("", p)
		}
	}
	if release != "" {
		found = slices.DeleteFunc(found, func(k kernel) bool { return k.release != release })
	}
	if len(found) == 0 {
		return kernel{}, fmt.Errorf("no kernel in /boot or /lib/modules: %w", fs.ErrNotExist)
	}
	// A kernel without its modules boots little: one with them goes first.
	slices.SortStableFunc(found, func(a, b kernel) int {
		if (a.modules == "") != (b.modules == "") {
			return map[bool]int{true: 1, false: -1}[a.modules == ""]
		}
		return kernels.CompareReleases(b.release, a.release)
	})
	return found[0], nil
}

func readDir(root fs.FS, dir string) []fs.DirEntry {
	entries, err := fs.ReadDir(root, dir)
	if err != nil {
		return nil // there is no such directory
	}
	return entries
}

// buildInitrd writes the initrd that boots a captured root. It is not
// compressed: the image's chunks are, and a module that did not change is
// found again in them.
func buildInitrd(ctx context.Context, root fs.FS, k kernel, init string, w io.Writer) (*initrd.Report, error) {
	o := initrd.Options{Init: init, Compression: initrd.None, Version: k.release}
	if k.modules != "" {
		modules, err := fs.Sub(root, k.modules)
		if err != nil {
			return nil, err
		}
		o.Modules = modules
	}
	o.Config.KernelRelease = k.release
	return initrd.Build(ctx, o, w)
}

// architectures are an image's, by what programs of the root are made for.
var architectures = map[elf.Machine]string{elf.EM_X86_64: "x86_64", elf.EM_AARCH64: "arm64", elf.EM_386: "i386"}

// architecture tells what a root's programs run on; "" if it has none that tells.
func architecture(root fs.FS) string {
	for _, name := range []string{"sbin/init", "bin/sh", "usr/bin/env", "usr/lib/systemd/systemd", "lib/systemd/systemd", "bin/busybox"} {
		f, err := root.Open(name)
		if err != nil {
			continue
		}
		head := make([]byte, 64)
		_, err = io.ReadFull(f, head)
		f.Close()
		if err != nil || !bytes.HasPrefix(head, []byte(elf.ELFMAG)) || head[elf.EI_DATA] != byte(elf.ELFDATA2LSB) {
			continue
		}
		if a := architectures[elf.Machine(uint16(head[18])|uint16(head[19])<<8)]; a != "" {
			return a
		}
	}
	return ""
}

// elfArchitecture is what an executable of this machine runs on.
func elfArchitecture(file string) (string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return architectures[f.Machine], nil
}

// commandLine is what the captured kernel is given, without what belongs to
// the machine's disk and boot loader: of the running system for the live
// root, else what the root's boot loader is configured with.
func commandLine(r *rootfs.Root, root fs.FS) string {
	var words []string
	switch {
	case r.Facts.MountPoint && r.Volume() == "/":
		data, err := os.ReadFile("/proc/cmdline")
		if err != nil {
			return ""
		}
		words = strings.Fields(string(data))
	default:
		if data, err := fs.ReadFile(root, "etc/kernel/cmdline"); err == nil {
			words = strings.Fields(string(data))
		} else if data, err := fs.ReadFile(root, "etc/default/grub"); err == nil {
			words = grubWords(string(data))
		}
	}
	words = slices.DeleteFunc(words, func(w string) bool {
		name, _, _ := strings.Cut(w, "=")
		switch name {
		case "root", "BOOT_IMAGE", "initrd", "resume", "rootflags", "rootfstype", "rootdelay", "rootwait":
			return true
		}
		return strings.ContainsFunc(w, func(c rune) bool { return c < ' ' || c > '~' || c == '"' || c == '\\' })
	})
	const limit = 1024
	line := strings.Join(words, " ")
	if len(line) > limit {
		return ""
	}
	return line
}

// grubWords are the words of GRUB_CMDLINE_LINUX and GRUB_CMDLINE_LINUX_DEFAULT
// in Debian's and Red Hat's /etc/default/grub, which is a shell script of
// which this understands plain assignments.
func grubWords(text string) []string {
	var words []string
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if name != "GRUB_CMDLINE_LINUX" && name != "GRUB_CMDLINE_LINUX_DEFAULT" || strings.ContainsAny(value, "$`\\") {
			continue
		}
		words = append(words, strings.Fields(strings.Trim(value, `"'`))...)
	}
	return words
}
