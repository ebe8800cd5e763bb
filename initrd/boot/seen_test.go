package boot

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/metadata/ticket"
)

// Seen is a file with what the system of a lazy root sees on its disk, whether all
// of it is there or not. The disk stays as it is.
func Seen(t testing.TB, tk *ticket.Ticket, target string) (file string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	img, err := openTicket(ctx, tk, tk.InstanceID, "", &fetcher{
		client: http.DefaultClient, stall: time.Minute, access: &access{t: tk}, say: t.Logf,
	})
	check(t, err)
	i := img.(*instarImage)
	dir := t.TempDir()
	// To open a device is to write to its disk.
	used := filepath.Join(dir, "used")
	if out, err := exec.Command("cp", "--sparse=always", target, used).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	disk, err := os.OpenFile(used, os.O_RDWR, 0)
	check(t, err)
	defer disk.Close()
	st, err := disk.Stat()
	check(t, err)
	c := &lazyConfig{
		Image: i.name, Manifest: i.manifest, Index: i.root.Name, IndexSize: i.root.Size, IndexRoot: i.rootObject, Key: i.key,
		Size: i.stream.Size(), Instance: tk.InstanceID, Ticket: tk, Patience: 1,
	}
	dev, _, err := c.open(ctx, nil, lazyroot.FileDisk(disk, st.Size()), nil, nil, t.Logf)
	check(t, err)
	defer dev.Close()
	file = filepath.Join(dir, "seen")
	f, err := os.Create(file)
	check(t, err)
	defer f.Close()
	_, err = io.Copy(f, io.NewSectionReader(deviceReader{ctx, dev}, 0, dev.Size()))
	check(t, err)
	return file
}
