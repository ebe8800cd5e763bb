package main

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync"
	"time"

	"github.com/instar-image/instar/agent/machine"
	"github.com/instar-image/instar/initrd/lazyroot"
	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/images"
)

// noted is a store that notes what is read of it.
type noted struct {
	*far
	mu   sync.Mutex
	list []request
}

type request struct {
	key string
	o   upload.GetOptions
}

// Get notes the request.
func (n *noted) Get(ctx context.Context, key string, o upload.GetOptions) (io.ReadCloser, upload.Object, error) {
	n.mu.Lock()
	n.list = append(n.list, request{key, o})
	n.mu.Unlock()
	return n.far.Get(ctx, key, o)
}

// workstation opens the image as mount and nbd do, named in full, reads its
// superblock, and then fetches the same objects one after the other.
func (b *bencher) workstation(ctx context.Context) (requests int, ratio float64, err error) {
	s := &noted{far: &far{Store: b.objects, line: lines[0]}}
	m := machine.Open(machine.Options{Dir: filepath.Join(b.dir, "keys")})
	ids, err := m.Identities()
	if err != nil {
		return 0, 0, err
	}
	trust, err := m.Signers(nil)
	if err != nil {
		return 0, 0, err
	}
	begun := time.Now()
	store, err := images.Open(s, images.Options{Trust: trust, Identities: ids})
	if err != nil {
		return 0, 0, err
	}
	img, err := store.Resolve(ctx, "bench@"+b.traced.image.Name.String(), images.ResolveOptions{})
	if err != nil {
		return 0, 0, err
	}
	index, err := img.Open(ctx)
	if err != nil {
		return 0, 0, err
	}
	image, err := lazyroot.NewImage(index, lazyroot.ImageOptions{})
	if err != nil {
		return 0, 0, err
	}
	dev, err := lazyroot.Open(ctx, lazyroot.Options{Image: image})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	if err := dev.ReadAt(ctx, make([]byte, 1024), 1024); err != nil {
		return 0, 0, err
	}
	took := time.Since(begun)
	list := s.list
	plain := &far{Store: b.objects, line: lines[0]}
	begun = time.Now()
	for _, r := range list {
		body, _, err := plain.Get(ctx, r.key, r.o)
		if err == nil {
			_, err = io.Copy(io.Discard, body)
			body.Close()
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return len(list), took.Seconds() / time.Since(begun).Seconds(), nil
}
