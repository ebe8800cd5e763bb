package initrd

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxModule bounds one module, unpacked, in bytes.
const maxModule = 64 << 20

// DefaultModules are the modules looked for when none are named: what a root
// on a disk of a virtual machine, or of a common server, needs. Those that a
// kernel lacks or has built in are left out.
func DefaultModules() []string {
	return []string{
		"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_net", "virtio_rng",
		"nvme", "ahci", "sd_mod", "xen_blkfront", "xen_netfront", "hv_netvsc", "hv_storvsc",
		"ena", "e1000", "e1000e", "igb", "ixgbe", "i40e", "tg3", "bnxt_en", "r8169", "vmxnet3",
		"af_packet", "crc32c_generic",
	}
}

// rootFilesystems are the modules of filesystems that a root may have. They
// are loaded only when one is to be mounted: btrfs measures for a second how
// fast this machine is before it does anything.
func rootFilesystems() []string { return []string{"ext4", "xfs", "btrfs"} }

// lazyModules are for a root that comes lazily, and loaded only then.
func lazyModules() []string { return []string{"dm_mod", "nbd"} }

// Module is a kernel module as it goes into the initrd.
type Module struct {
	Name string // with '_' for '-', without suffix
	Path string // below the modules directory, without a compression suffix
	Data []byte // unpacked
}

// FindModules tells the directory lib/modules/VERSION in the root directory
// fsys. An empty version stands for the only one there is.
func FindModules(fsys fs.FS, version string) (dir, found string, err error) {
	for _, base := range []string{"lib/modules", "usr/lib/modules"} {
		entries, err := fs.ReadDir(fsys, base)
		if err != nil {
			continue
		}
		var versions []string
		for _, e := range entries {
			if _, err := fs.Stat(fsys, path.Join(base, e.Name(), "kernel")); err == nil {
				versions = append(versions, e.Name())
			}
		}
		switch {
		case version != "" && slices.Contains(versions, version):
			return path.Join(base, version), version, nil
		case version == "" && len(versions) == 1:
			return path.Join(base, versions[0]), versions[0], nil
		case version == "" && len(versions) > 1:
			return "", "", fmt.Errorf("modules of several kernels are there (%s): name one", strings.Join(versions, ", "))
		}
	}
	if version == "" {
		version = "any kernel"
	}
	return "", "", fmt.Errorf("modules of %s: %w in lib/modules", version, fs.ErrNotExist)
}

// moduleSet is an index of a modules directory.
type moduleSet struct {
	fsys    fs.FS
	files   map[string]string // name to path
	builtin map[string]bool
	state   map[string]int // 1 while its dependencies are being added, 2 when it is added
	out     []Module
}

// newModuleSet indexes a modules directory (lib/modules/VERSION).
func newModuleSet(fsys fs.FS) (*moduleSet, error) {
	s := &moduleSet{fsys: fsys, files: make(map[string]string), builtin: make(map[string]bool), state: make(map[string]int)}
	return s, s.index()
}

// take reads the modules named and all that these depend on, in the order
// they are to be loaded, but for those taken before. Dependencies come from
// the modules themselves: no modules.dep is needed. A name that is neither
// there nor built in is an error if strict, else left out and listed in absent.
func (s *moduleSet) take(names []string, strict bool) (modules []Module, absent []string, err error) {
	s.out = nil
	for _, n := range names {
		n = moduleName(n)
		if s.files[n] == "" && !s.builtin[n] {
			if strict {
				return nil, nil, fmt.Errorf("kernel module %s: neither a file nor built in", n)
			}
			absent = append(absent, n)
			continue
		}
		if err := s.add(n, ""); err != nil {
			return nil, nil, err
		}
	}
	return s.out, absent, nil
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// splitModule tells the module's name and the path without compression suffix.
func splitModule(file string) (name, plain string, ok bool) {
	plain = file
	for _, suffix := range []string{".xz", ".zst", ".gz"} {
		if p, cut := strings.CutSuffix(file, suffix); cut {
			plain = p
			break
		}
	}
	base, ok := strings.CutSuffix(path.Base(plain), ".ko")
	return moduleName(base), plain, ok
}

func (s *moduleSet) index() error {
	err := fs.WalkDir(s.fsys, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// build and source lead to the kernel's headers.
		if name, _, ok := splitModule(file); ok && d.Type().IsRegular() {
			s.files[name] = file
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("listing kernel modules: %w", err)
	}
	list, err := fs.ReadFile(s.fsys, "modules.builtin")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing what is built into the kernel: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		if name, _, ok := splitModule(strings.TrimSpace(line)); ok {
			s.builtin[name] = true
		}
	}
	return nil
}

func (s *moduleSet) add(name, wantedBy string) error {
	if s.builtin[name] {
		return nil
	}
	switch s.state[name] {
	case 1:
		return fmt.Errorf("kernel module %s depends on itself", name)
	case 2:
		return nil
	}
	file := s.files[name]
	if file == "" {
		return fmt.Errorf("kernel module %s, which %s depends on, is neither a file nor built in", name, wantedBy)
	}
	s.state[name] = 1
	data, err := readModule(s.fsys, file)
	if err != nil {
		return fmt.Errorf("reading kernel module %s: %w", file, err)
	}
	needs, wishes, err := dependencies(data)
	if err != nil {
		return fmt.Errorf("reading kernel module %s: %w", file, err)
	}
	for _, n := range needs {
		if err := s.add(n, name); err != nil {
			return err
		}
	}
	for _, n := range wishes {
		if s.files[n] != "" && s.state[n] == 0 {
			if err := s.add(n, name); err != nil {
				return err
			}
		}
	}
	s.state[name] = 2
	_, plain, _ := splitModule(file)
	s.out = append(s.out, Module{Name: name, Path: plain, Data: data})
	return nil
}

func readModule(fsys fs.FS, file string) ([]byte, error) {
	f, err := fsys.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var r io.Reader = f
	switch path.Ext(file) {
	case ".xz":
		r, err = xz.NewReader(f)
	case ".gz":
		r, err = gzip.NewReader(f)
	case ".zst":
		var d *zstd.Decoder
		d, err = zstd.NewReader(f, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxModule))
		if err == nil {
			defer d.Close()
			r = d
		}
	}
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(data) > maxModule {
		err = fmt.Errorf("longer than %d bytes", maxModule)
	}
	return data, err
}

// dependencies reads a module's .modinfo section: the modules it needs, and
// those it wishes loaded before it (softdep pre).
func dependencies(data []byte) (needs, wishes []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("no .modinfo section: not a kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			for n := range strings.SplitSeq(value, ",") {
				if n != "" {
					needs = append(needs, moduleName(n))
				}
			}
		case "softdep":
			pre := false
			for w := range strings.FieldsSeq(value) {
				switch {
				case strings.HasSuffix(w, ":"):
					pre = w == "pre:"
				case pre:
					wishes = append(wishes, moduleName(w))
				}
			}
		}
	}
	return needs, wishes, nil
}

// hostVersion is the release of the running kernel.
func hostVersion() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", fmt.Errorf("asking for the kernel's release: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
