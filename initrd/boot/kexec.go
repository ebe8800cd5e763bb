package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/agent/inject/inroot"
	"github.com/instar-image/instar/initrd/kernels"
)

// HandoverFile is where the initrd of a kernel that was started by kexec finds
// the instance, which the one before it was told.
const HandoverFile = "/etc/instar/instance.json"

// Limits of what is read from an image, in bytes.
const (
	maxKernel     = 256 << 20
	maxModule     = 64 << 20
	maxModulesDep = 16 << 20
)

// kexec goes on with the image's own kernel, if instar.kexec says so. The init
// there is this one again: it has the instance and the root from here, and the
// modules for the root's disk from the image.
func (m *machine) kexec(ctx context.Context) error {
	if m.config.Kexec == "" {
		return nil
	}
	root, err := inroot.Open(rootDir)
	if err != nil {
		return err
	}
	defer root.Close()
	release, kernel, err := imageKernel(root, m.config.Kexec)
	if err != nil {
		return final(err)
	}
	defer kernel.Close()
	modules, err := imageModules(root, release, kexecModules(m.disk.Kind))
	if err != nil {
		return final(err)
	}
	initrd, err := m.nextInitrd(release, modules)
	if err != nil {
		return fmt.Errorf("making the initrd of the image's kernel: %w", err)
	}
	defer initrd.Close()
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	next := nextCmdline(string(cmdline), m.disk.spec(), m.config.Append)
	if err := unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), next, 0); err != nil {
		if errors.Is(err, unix.ENOSYS) {
			err = errors.New("this kernel has no kexec")
		}
		return final(fmt.Errorf("loading the image's kernel %s: %w", release, err))
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.say("kexec: the image's kernel %s, %d modules: %s", release, len(modules), next)
	kernel.Close()
	root.Close()
	if err := unix.Unmount(rootDir, 0); err != nil {
		return fmt.Errorf("unmounting the root: %w", err)
	}
	m.disk = nil
	m.release()
	unix.Sync()
	return final(fmt.Errorf("starting the image's kernel: %w", unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC)))
}

// imageKernel opens a kernel of the image, unpacked where kexec needs that:
// the newest, or that of the release wanted.
func imageKernel(root *inroot.Root, wanted string) (release string, kernel *os.File, err error) {
	dir, err := root.OpenDir("/boot")
	if err != nil {
		return "", nil, fmt.Errorf("the image has no kernel: %w", err)
	}
	names, err := dir.Readdirnames(10_000)
	dir.Close()
	if err != nil && !errors.Is(err, io.EOF) {
		return "", nil, fmt.Errorf("listing the image's kernels: %w", err)
	}
	var found []string
	for _, n := range names {
		if r, ok := strings.CutPrefix(n, "vmlinuz-"); ok && r != "" && (wanted == "true" || wanted == r) {
			found = append(found, r)
		}
	}
	if len(found) == 0 {
		what := "/boot/vmlinuz-RELEASE"
		if wanted != "true" {
			what = "/boot/vmlinuz-" + wanted
		}
		return "", nil, fmt.Errorf("the image has no %s to kexec", what)
	}
	release = slices.MaxFunc(found, kernels.CompareReleases)
	f, err := root.OpenFile("/boot/vmlinuz-" + release)
	if err != nil {
		return "", nil, fmt.Errorf("opening the image's kernel: %w", err)
	}
	kernel, err = unpackedKernel(f)
	if err != nil {
		f.Close()
		return "", nil, fmt.Errorf("reading the image's kernel %s: %w", release, err)
	}
	return release, kernel, nil
}

// unpackedKernel returns f, or a file with its content where that is a gzip
// stream, as arm64's kernels often are.
func unpackedKernel(f *os.File) (*os.File, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() > maxKernel {
		return nil, fmt.Errorf("it has %d bytes, more than %d", st.Size(), maxKernel)
	}
	head := make([]byte, 2)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, err
	}
	if string(head) != "\x1f\x8b" {
		return f, nil
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		return nil, err
	}
	out, err := os.CreateTemp("", "kernel")
	if err != nil {
		return nil, err
	}
	defer os.Remove(out.Name())
	n, err := io.Copy(out, io.LimitReader(z, maxKernel+1))
	if err == nil && n > maxKernel {
		err = fmt.Errorf("it has more than %d bytes", maxKernel)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return nil, err
	}
	f.Close()
	return os.Open(out.Name()) // what is open for writing is not loaded
}

// kexecModules are the modules without which a root on a common disk is not
// reached.
func kexecModules(filesystem string) []string {
	if strings.HasPrefix(filesystem, "ext") {
		filesystem = "ext4"
	}
	return []string{
		"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "nvme", "ahci", "ata_piix", "sd_mod",
		"xen_blkfront", "hv_storvsc", "vmw_pvscsi", "mptspi", "crc32c_generic", filesystem,
	}
}

// imageModule is a kernel module of the image, as it is stored there.
type imageModule struct {
	name string // below lib/modules/RELEASE
	data []byte
}

// imageModules reads the modules named that are there, and those that they
// depend on before them. An image whose kernel has all built in has none.
func imageModules(root *inroot.Root, release string, names []string) ([]imageModule, error) {
	dir := "/lib/modules/" + release
	if !root.Exists(dir + "/modules.dep") {
		return nil, nil
	}
	text, err := readImage(root, dir+"/modules.dep", maxModulesDep)
	if err != nil {
		return nil, fmt.Errorf("reading the image's modules: %w", err)
	}
	var modules []imageModule
	for _, name := range moduleOrder(string(text), names) {
		data, err := readImage(root, dir+"/"+name, maxModule)
		if err != nil {
			return nil, fmt.Errorf("reading the image's modules: %w", err)
		}
		modules = append(modules, imageModule{name, data})
	}
	return modules, nil
}

// moduleOrder lists the files of the modules named and of what they depend on,
// in the order to load them, by depmod's modules.dep.
func moduleOrder(dep string, names []string) []string {
	needs := make(map[string][]string)
	files := make(map[string]string)
	for line := range strings.Lines(dep) {
		file, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || path.IsAbs(file) {
			continue
		}
		needs[file] = strings.Fields(rest)
		base, _, _ := strings.Cut(path.Base(file), ".ko")
		files[strings.ReplaceAll(base, "-", "_")] = file
	}
	var order []string
	seen := make(map[string]bool)
	var add func(file string)
	add = func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		if _, known := needs[file]; !known {
			return
		}
		for _, n := range needs[file] {
			add(n)
		}
		order = append(order, file)
	}
	for _, n := range names {
		if f := files[n]; f != "" {
			add(f)
		}
	}
	return order
}

func readImage(root *inroot.Root, name string, limit int64) ([]byte, error) {
	f, err := root.OpenFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return data, err
}

// nextInitrd makes the initrd that goes with the image's kernel.
func (m *machine) nextInitrd(release string, modules []imageModule) (*os.File, error) {
	out, err := os.CreateTemp("", "initrd")
	if err != nil {
		return nil, err
	}
	defer os.Remove(out.Name())
	err = m.writeInitrd(out, release, modules)
	if err = errors.Join(err, out.Close()); err != nil {
		return nil, err
	}
	return os.Open(out.Name()) // what is open for writing is not loaded
}

func (m *machine) writeInitrd(out io.Writer, release string, modules []imageModule) error {
	config := m.config
	config.Kexec, config.Append, config.Net, config.Root, config.Grow, config.KernelRelease = "", "", "none", m.disk.spec(), false, release
	boot, err := json.Marshal(config)
	if err != nil {
		return err
	}
	instance, err := json.Marshal(m.instance)
	if err != nil {
		return err
	}
	init, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	records := []cpio.Record{cpio.CharDev("dev/console", 0o600, 5, 1), cpio.CharDev("dev/null", 0o666, 1, 3), cpio.StaticFile("init", string(init), 0o755)}
	var order strings.Builder
	for i, mod := range modules {
		// Numbered: the names are the image's.
		name := fmt.Sprintf("lib/modules/%03d%s", i, moduleSuffix(mod.name))
		records = append(records, cpio.StaticFile(name, string(mod.data), 0o600))
		fmt.Fprintf(&order, "/%s\n", name)
	}
	records = append(records,
		cpio.StaticFile(strings.TrimPrefix(ModulesFile, "/"), order.String(), 0o600),
		cpio.StaticFile(strings.TrimPrefix(ConfigFile, "/"), string(boot), 0o600),
		cpio.StaticFile(strings.TrimPrefix(HandoverFile, "/"), string(instance), 0o600))
	if shell, err := os.ReadFile("/bin/sh"); err == nil {
		records = append(records, cpio.StaticFile("bin/sh", string(shell), 0o755))
	}
	w := cpio.Newc.Writer(out)
	for _, d := range []string{"bin", "dev", "etc", "etc/instar", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp"} {
		if err := w.WriteRecord(cpio.Directory(d, 0o755)); err != nil {
			return err
		}
	}
	if err := cpio.WriteRecords(w, records); err != nil {
		return err
	}
	return cpio.WriteTrailer(w)
}

// moduleSuffix is ".ko", with that of its compression.
func moduleSuffix(name string) string {
	for _, s := range []string{".ko.xz", ".ko.zst", ".ko.gz"} {
		if strings.HasSuffix(name, s) {
			return s
		}
	}
	return ".ko"
}

// nextCmdline makes the image's kernel's parameters of this one's: without
// Instar's and what names another kernel's root and initrd, with those to
// append.
func nextCmdline(current, root, more string) string {
	var words []string
	for _, w := range splitCmdline(current) {
		key, _, _ := strings.Cut(w, "=")
		if w == "--" {
			break
		}
		if strings.HasPrefix(key, "instar.") || slices.Contains([]string{"root", "rootflags", "rootfstype", "init", "rdinit", "initrd", "BOOT_IMAGE"}, key) {
			continue
		}
		if strings.ContainsAny(w, " \t") {
			w = `"` + w + `"`
		}
		words = append(words, w)
	}
	words = append(words, "root="+root)
	return strings.TrimSpace(strings.Join(words, " ") + " " + more)
}

// handedOver reads, once, the instance that the initrd before this one knew.
func handedOver(file string) (*instance, error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = os.Remove(file)
	}
	in := new(instance)
	if err == nil {
		err = json.Unmarshal(data, in)
	}
	if err != nil {
		return nil, fmt.Errorf("reading what the initrd before this one handed over: %w", err)
	}
	return in, nil
}
