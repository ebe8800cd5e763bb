package rootfs

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// localTypes are the filesystems that live on this machine's own disks. Beside
// what the classic tools copy these are the ones in use since: btrfs, zfs,
// f2fs, bcachefs, and vfat and exfat, which hold /boot/efi.
var localTypes = []string{
	"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "jfs", "reiserfs", "f2fs", "bcachefs", "nilfs2", "vfat", "msdos", "exfat",
}

// pseudoTypes hold no files but show what the kernel knows: they are never
// captured, not even with Options.All.
var pseudoTypes = []string{
	"autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "cpuset", "debugfs", "devpts", "devtmpfs", "efivarfs",
	"fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "fusectl", "hugetlbfs", "mqueue", "nfsd", "nsfs", "proc", "pstore", "resctrl",
	"rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs",
}

// mount is one mount within the volume and what is done with it.
type mount struct {
	id   uint64
	typ  string
	dev  [2]int
	root string // directory of the filesystem that the mount shows
	path string // where, relative to the volume; "." for the volume itself
	at   string // where, as the machine has it
	src  string // the device, or what stands for it
	opts string // mount options of the filesystem

	use   bool
	class Class
	why   string
}

// mountTable is what is mounted in and beneath the volume.
type mountTable struct {
	all    []*mount
	byID   map[uint64]*mount
	byPath map[string]*mount // the topmost one of each path
	root   *mount            // the mount the volume is in
}

// newMountTable picks the mounts of the volume out of infos. rootID is the
// mount the volume itself is in, 0 if the kernel does not tell. leftOut tells
// which paths stay out of the image for other reasons.
func newMountTable(infos []*mountinfo.Info, volume string, rootID uint64, all bool, leftOut func(string) bool) (*mountTable, error) {
	t := &mountTable{byID: map[uint64]*mount{}, byPath: map[string]*mount{}}
	if t.root = volumeMount(infos, volume, rootID); t.root == nil {
		return nil, fmt.Errorf("no mount holds %s: is /proc mounted?", volume)
	}
	if slices.Contains(pseudoTypes, t.root.typ) {
		return nil, fmt.Errorf("%w: %s is a %s filesystem", ErrNoFiles, volume, t.root.typ)
	}
	t.root.use = true
	t.add(t.root)
	for _, i := range infos {
		rel, ok := beneath(volume, i.Mountpoint)
		if !ok || rel == "." {
			continue
		}
		t.add(newMount(i, rel))
	}
	for _, m := range t.all[1:] {
		t.judge(m, all, leftOut)
	}
	return t, nil
}

// within gives the table of a view of the volume, mounted at merged: what
// shows a mount of t shares its fate.
func (t *mountTable) within(infos []*mountinfo.Info, merged string, all bool, leftOut func(string) bool) (*mountTable, error) {
	v := &mountTable{byID: map[uint64]*mount{}, byPath: map[string]*mount{}}
	var fresh []*mount // what the script has mounted
	for _, i := range infos {
		rel, ok := beneath(merged, i.Mountpoint)
		if !ok {
			continue
		}
		m := newMount(i, rel)
		if old := t.byPath[rel]; old != nil {
			m.typ, m.src, m.use, m.class, m.why = old.typ, old.src, old.use, old.class, old.why
		} else {
			fresh = append(fresh, m)
		}
		v.add(m)
	}
	for _, m := range fresh {
		v.judge(m, all, leftOut)
	}
	if v.root = v.byPath["."]; v.root == nil {
		return nil, fmt.Errorf("the view at %s is gone", merged)
	}
	return v, nil
}

// volumeMount finds the mount that volume lies in; its root is the directory
// of the filesystem that volume is.
func volumeMount(infos []*mountinfo.Info, volume string, id uint64) *mount {
	var found *mountinfo.Info
	for _, i := range infos {
		if _, ok := beneath(i.Mountpoint, volume); !ok {
			continue
		}
		if id != 0 && uint64(i.ID) == id {
			found = i
			break
		}
		if id == 0 && (found == nil || len(i.Mountpoint) >= len(found.Mountpoint)) {
			found = i
		}
	}
	if found == nil {
		return nil
	}
	m := newMount(found, ".")
	if rel, _ := beneath(found.Mountpoint, volume); rel != "." {
		m.root = path.Join(m.root, rel)
	}
	return m
}

func newMount(i *mountinfo.Info, rel string) *mount {
	return &mount{
		id: uint64(i.ID), typ: i.FSType, dev: [2]int{i.Major, i.Minor}, root: i.Root, path: rel, at: i.Mountpoint, src: i.Source, opts: i.VFSOptions,
	}
}

func (t *mountTable) add(m *mount) {
	t.all = append(t.all, m)
	t.byID[m.id] = m
	t.byPath[m.path] = m
}

// judge decides whether a mount beneath the volume is captured, all mounts
// being in the table and those before it judged.
func (t *mountTable) judge(m *mount, all bool, leftOut func(string) bool) {
	switch {
	case t.byPath[m.path] != m:
		m.class, m.why = Duplicate, "lies hidden beneath another mount"
		return
	case slices.Contains(pseudoTypes, m.typ):
		m.class, m.why = Pseudo, m.typ+" shows the kernel's state, not files"
		return
	case !all && !slices.Contains(localTypes, m.typ):
		m.class, m.why = NotLocal, m.typ+" is not a local filesystem (--all takes it along)"
		return
	}
	m.use = true
	for _, k := range t.all {
		if k == m || !k.use || k.dev != m.dev || leftOut(k.path) {
			continue
		}
		// What holds the volume itself is where btrfs keeps its snapshots. What
		// holds another mount goes in, twice in part: nothing else has the rest.
		if rel, ok := beneath(m.root, k.root); ok && rel != "." && k == t.root {
			m.use, m.class, m.why = false, Duplicate, "holds the volume itself and more"
			return
		}
		rel, ok := beneath(k.root, m.root)
		if !ok {
			continue
		}
		seen := path.Join(k.path, rel)
		if t.holder(seen) == k && !leftOut(seen) {
			m.use, m.class, m.why = false, Duplicate, "the same files are captured as "+display(seen)
			return
		}
	}
}

// holder is the mount that shows path.
func (t *mountTable) holder(p string) *mount {
	for {
		if m := t.byPath[p]; m != nil {
			return m
		}
		p = path.Dir(p)
	}
}

// beneath gives p relative to dir, "." if they are the same. Both are clean
// and either absolute or relative to the same directory.
func beneath(dir, p string) (string, bool) {
	if dir == p {
		return ".", true
	}
	if dir == "." {
		return p, !strings.HasPrefix(p, "/")
	}
	if !strings.HasSuffix(dir, "/") {
		dir += "/"
	}
	return strings.CutPrefix(p, dir)
}

// display shows a path relative to the volume the way people write it.
func display(p string) string {
	if p == "." {
		return "/"
	}
	return "/" + p
}
