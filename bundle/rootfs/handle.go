package rootfs

import (
	"container/list"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-image/instar/bundle/filetree"
)

// Every open in this package names one path component relative to a directory
// handle and refuses symbolic links: what openat2(2) gives with
// RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, on kernels without it too, and for
// paths of any length.
const (
	openDir  = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	openFile = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOFOLLOW | unix.O_NOCTTY | unix.O_CLOEXEC
)

// openat opens name beneath dir without changing its access time where the
// caller may ask for that.
func openat(dir int, name string, flags int) (int, error) {
	fd, err := retry(func() (int, error) { return unix.Openat(dir, name, flags|unix.O_NOATIME, 0) })
	if errors.Is(err, unix.EPERM) {
		fd, err = retry(func() (int, error) { return unix.Openat(dir, name, flags, 0) })
	}
	return fd, err
}

// openPath opens a directory at a path relative to dir, component by component.
func openPath(dir int, path string) (int, error) {
	fd, err := openat(dir, ".", openDir)
	if err != nil || path == "." {
		return fd, err
	}
	for name := range strings.SplitSeq(path, "/") {
		next, err := openat(fd, name, openDir)
		unix.Close(fd)
		if err != nil {
			return -1, err
		}
		fd = next
	}
	return fd, nil
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

const (
	statxMask  = unix.STATX_BASIC_STATS | unix.STATX_MNT_ID
	statxFlags = unix.AT_SYMLINK_NOFOLLOW | unix.AT_NO_AUTOMOUNT
)

func statAt(dir int, name string, st *unix.Statx_t) error {
	_, err := retry(func() (int, error) { return 0, unix.Statx(dir, name, statxFlags, statxMask, st) })
	return err
}

func statFD(fd int, st *unix.Statx_t) error {
	_, err := retry(func() (int, error) {
		return 0, unix.Statx(fd, "", unix.AT_EMPTY_PATH, statxMask, st)
	})
	return err
}

func device(st *unix.Statx_t) uint64 { return unix.Mkdev(st.Dev_major, st.Dev_minor) }

// readNames returns the names in an open directory, sorted by their bytes. On
// an error it returns those read so far as well.
func readNames(fd int, buf []byte) ([]string, error) {
	var names []string
	for {
		n, err := retry(func() (int, error) { return unix.ReadDirent(fd, buf) })
		if err != nil || n == 0 {
			slices.Sort(names)
			return slices.Compact(names), err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

// maxDirs bounds the directory handles a dirCache keeps open.
const maxDirs = 64

// dirCache opens directories of a tree and keeps the ones used last open, so
// that neither deep hierarchies run out of handles nor full directories are
// looked up once per file. It may be used by several goroutines at once.
type dirCache struct {
	mu     sync.Mutex
	tree   *filetree.Tree
	root   int                                 // handle of the volume; not owned
	grafts map[filetree.ID]func() (int, error) // directories found elsewhere than in their parent
	open   map[filetree.ID]*list.Element
	lru    list.List // of cachedDir, the one used last in front
}

type cachedDir struct {
	id filetree.ID
	fd int
}

func newDirCache(tree *filetree.Tree, root int) *dirCache {
	return &dirCache{
		tree: tree, root: root,
		grafts: map[filetree.ID]func() (int, error){}, open: map[filetree.ID]*list.Element{},
	}
}

// with calls f with a handle of directory id that is valid during the call.
// Its error wraps filetree.ErrVanished or filetree.ErrReplaced where the
// directory is not what the tree says any more.
func (c *dirCache) with(id filetree.ID, f func(fd int) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	fd, err := c.get(id)
	if err != nil {
		return err
	}
	return f(fd)
}

func (c *dirCache) get(id filetree.ID) (int, error) {
	// The chain of directories down from the nearest one that is open;
	// a loop, for hierarchies may be deeper than a stack wants to be.
	var chain []filetree.ID
	at, fd := id, -1
	for {
		if e, ok := c.open[at]; ok {
			c.lru.MoveToFront(e)
			fd = e.Value.(cachedDir).fd
			break
		}
		chain = append(chain, at)
		if at == filetree.Root {
			break
		}
		if _, ok := c.grafts[at]; ok {
			break
		}
		at = c.tree.Parent(at)
	}
	for _, id := range slices.Backward(chain) {
		var next int
		var err error
		if graft, ok := c.grafts[id]; ok {
			next, err = graft()
		} else if id == filetree.Root {
			next, err = openat(c.root, ".", openDir)
		} else {
			next, err = openat(fd, c.tree.Name(id), openDir)
		}
		if err == nil {
			err = c.verify(next, id)
		}
		if err != nil {
			return -1, fmt.Errorf("opening directory %q: %w", c.tree.Path(id), classify(err))
		}
		c.put(id, next)
		fd = next
	}
	return fd, nil
}

// verify closes fd unless it is the directory that the tree has as id.
func (c *dirCache) verify(fd int, id filetree.ID) error {
	var st unix.Statx_t
	err := statFD(fd, &st)
	if a := c.tree.Attr(id); err == nil && (device(&st) != a.Dev || st.Ino != a.Ino) {
		err = filetree.ErrReplaced
	}
	if err != nil {
		unix.Close(fd)
	}
	return err
}

func (c *dirCache) put(id filetree.ID, fd int) {
	c.open[id] = c.lru.PushFront(cachedDir{id, fd})
	if c.lru.Len() > maxDirs {
		c.drop(c.lru.Back())
	}
}

func (c *dirCache) drop(e *list.Element) {
	d := c.lru.Remove(e).(cachedDir)
	delete(c.open, d.id)
	unix.Close(d.fd)
}

func (c *dirCache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.lru.Len() > 0 {
		c.drop(c.lru.Back())
	}
}

// classify turns the errors of opening a name that was there a moment ago
// into those of package filetree.
func classify(err error) error {
	switch {
	case errors.Is(err, filetree.ErrVanished), errors.Is(err, filetree.ErrReplaced):
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return fmt.Errorf("%w: %w", filetree.ErrVanished, err)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %w", filetree.ErrReplaced, err)
	}
	return err
}
