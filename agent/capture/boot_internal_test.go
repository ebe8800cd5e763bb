package capture

import (
	"errors"
	"io/fs"
	"slices"
	"testing"
	"testing/fstest"
)

func TestFindKernel(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s), Mode: 0o644} }
	dir := &fstest.MapFile{Mode: fs.ModeDir | 0o755}
	debian := fstest.MapFS{
		"boot/vmlinuz-6.1.0-9-amd64": file("9"), "boot/vmlinuz-6.1.0-18-amd64": file("18"), "boot/vmlinuz-6.1.0-20-amd64": file("no modules"),
		"boot/config-6.1.0-21-amd64": file("x"), "boot/vmlinuz-0-rescue-abc": file("x"), "boot/vmlinuz-7.0.0": file(""),
		"usr/lib/modules/6.1.0-9-amd64/kernel": dir, "usr/lib/modules/6.1.0-18-amd64/kernel": dir,
	}
	fedora := fstest.MapFS{"lib/modules/6.5.6-300.fc39.x86_64/vmlinuz": file("f"), "lib/modules/6.5.6-300.fc39.x86_64/kernel": dir}
	plain := fstest.MapFS{"boot/vmlinuz": file("p")}
	for _, c := range []struct {
		root                   fs.FS
		ask                    string
		release, path, modules string
	}{
		{debian, "", "6.1.0-18-amd64", "boot/vmlinuz-6.1.0-18-amd64", "usr/lib/modules/6.1.0-18-amd64"},
		{debian, "6.1.0-9-amd64", "6.1.0-9-amd64", "boot/vmlinuz-6.1.0-9-amd64", "usr/lib/modules/6.1.0-9-amd64"},
		{debian, "6.1.0-20-amd64", "6.1.0-20-amd64", "boot/vmlinuz-6.1.0-20-amd64", ""},
		{fedora, "", "6.5.6-300.fc39.x86_64", "lib/modules/6.5.6-300.fc39.x86_64/vmlinuz", "lib/modules/6.5.6-300.fc39.x86_64"},
		{plain, "", "", "boot/vmlinuz", ""},
	} {
		k, err := findKernel(c.root, c.ask)
		if err != nil || k != (kernel{c.release, c.path, c.modules}) {
			t.Errorf("asked for %q: %+v, %v; want %+v", c.ask, k, err, c)
		}
	}
	for _, root := range []fs.FS{fstest.MapFS{}, fstest.MapFS{"boot/initrd.img-1": file("x")}} {
		if k, err := findKernel(root, ""); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("no kernel: %+v, %v", k, err)
		}
	}
	if _, err := findKernel(debian, "1.2.3"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a release that is not there: %v", err)
	}
}

func TestArchitecture(t *testing.T) {
	head := func(class, data byte, machine uint16) *fstest.MapFile {
		b := make([]byte, 64)
		copy(b, "\x7fELF")
		b[4], b[5], b[18], b[19] = class, data, byte(machine), byte(machine>>8)
		return &fstest.MapFile{Data: b, Mode: 0o755}
	}
	for _, c := range []struct {
		root fstest.MapFS
		want string
	}{
		{fstest.MapFS{"bin/sh": head(2, 1, 62)}, "x86_64"},
		{fstest.MapFS{"bin/sh": head(2, 1, 183)}, "arm64"},
		{fstest.MapFS{"bin/sh": head(1, 1, 3)}, "i386"},
		{fstest.MapFS{"sbin/init": {Data: []byte("#!/bin/sh\n"), Mode: 0o755}, "bin/sh": head(2, 1, 62)}, "x86_64"},
		{fstest.MapFS{"bin/sh": head(2, 2, 22)}, ""},
		{fstest.MapFS{}, ""},
	} {
		if got := architecture(c.root); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestGrubWords(t *testing.T) {
	got := grubWords("# x\nGRUB_CMDLINE_LINUX_DEFAULT=\"quiet splash\"\nGRUB_CMDLINE_LINUX='console=ttyS0,115200 net.ifnames=0'\nGRUB_DISTRIBUTOR=`lsb`\n" +
		"GRUB_CMDLINE_LINUX_RECOVERY=\"single\"\nGRUB_CMDLINE_LINUX=\"$evil\"\n")
	if want := []string{"quiet", "splash", "console=ttyS0,115200", "net.ifnames=0"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
