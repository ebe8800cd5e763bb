package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/instar-image/instar/cmd/instar/internal/ui"
	"github.com/instar-image/instar/upload/catalog"
	"github.com/instar-image/instar/upload/catalog/lease"
)

// leaseGlance is how often it is looked whether another process has ended.
const leaseGlance = 2 * time.Second

// inTurn does work that one process does at a time, when it is this one's turn.
func (a *app) inTurn(ctx context.Context, what string, work func() error) error {
	said := false
	for {
		err := work()
		if !errors.Is(err, lease.ErrTaken) {
			return err
		}
		if !said {
			a.ui.Say("another process is %s: waiting for it (one that was killed keeps its place for two minutes)", what)
			said = true
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(leaseGlance):
		}
	}
}

func runImagesStore(ctx context.Context, a *app, o *storeTaskOptions, ref string) error {
	if err := need(o.into, "--into"); err != nil {
		return err
	}
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	if len(tags) == 0 {
		tags = nil
	}
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		v, err := k.View(ctx)
		if err != nil {
			return err
		}
		m, err := findImage(ctx, v, call.Account, ref)
		if err != nil {
			return err
		}
		t, err := k.Store(ctx, call, catalog.StoreRequest{ImageID: m.ID, Bucket: o.into, Tags: tags})
		if err != nil {
			return err
		}
		bar := a.progress("storing " + m.ID)
		err = a.inTurn(ctx, "storing "+m.ID, func() (err error) {
			done, err := k.CompleteStore(ctx, rand.Text(), t, bar.to)
			if err == nil {
				t = done
			}
			return err
		})
		bar.end()
		if err == nil && t.State != catalog.Completed {
			err = failf(exitS3, "storing %s failed: %s", t.Image, t.Reason)
		}
		if err != nil {
			return err
		}
		return a.ui.Result("stored", fmt.Sprintf("%s is %s/%s: %s", t.Image, t.Bucket, t.Key, ui.Size(t.Size)), storedFields(t, 100))
	})
}

func storedFields(t *catalog.StoreTask, percent int) ui.Fields {
	f := ui.Fields{"image_id": t.Image, "bucket": t.Bucket, "key": t.Key, "state": t.State, "percent": percent, "started": t.Started}
	if t.State == catalog.Completed {
		f["size"] = t.Size
	}
	if t.Reason != "" {
		f["reason"] = t.Reason
	}
	if !t.Ended.IsZero() {
		f["ended"] = t.Ended
	}
	if len(t.Tags) > 0 {
		f["object_tags"] = t.Tags
	}
	return f
}

func runImagesRestoreFrom(ctx context.Context, a *app, o *restoreFromOptions, object string) error {
	bucket, key, ok := strings.Cut(strings.Trim(object, "/"), "/")
	if !ok {
		return usagef("%s is no object: write BUCKET/KEY", shown(object))
	}
	tags, err := tagsOf(o.tags)
	if err != nil {
		return err
	}
	return a.inAccount(ctx, &o.catalogOptions, func(k *openedCatalog, call catalog.Call) error {
		r := catalog.RestoreRequest{Bucket: bucket, Key: key, Name: o.name, Tags: tags, Folder: o.folder, Token: o.token}
		if r.Token == "" {
			r.Token = copyToken("restore", call.Account, bucket, key, o.name)
		}
		m, err := k.Restore(ctx, call, r)
		// One that failed, or is gone by now, is not what is asked for.
		for err == nil && o.token == "" && (m.State == catalog.Failed || m.State == catalog.Deregistered) {
			r.Token = copyToken("restore", r.Token, m.ID)
			m, err = k.Restore(ctx, call, r)
		}
		if catalog.IsUntrusted(err) {
			return withHint(&exitError{code: exitTrust, err: err}, "A line in allowed_signers lets a key speak for the region that the image was stored in: REGION namespaces=\"instar-catalog\" KEY.")
		}
		if err != nil {
			return err
		}
		if m.State == catalog.Pending {
			a.ui.Say("%s is pending: restoring", m.ID)
		}
		id := m.ID
		bar := a.progress("restoring " + id)
		err = a.inTurn(ctx, "restoring "+id, func() (err error) {
			m, err = k.CompleteRestore(ctx, call, rand.Text(), id, bar.to)
			return err
		})
		bar.end()
		if err != nil {
			return err
		}
		return a.ui.Result("restored_image", m.ID, recordFields(m))
	})
}

func runImagesStored(ctx context.Context, a *app, o *catalogOptions, ids []string) error {
	return a.lookAs(ctx, o, func(k *openedCatalog, v *catalog.View, account string) error {
		all, err := v.StoreTasks(ctx, account)
		if err != nil {
			return err
		}
		for _, t := range all {
			if t.Old(time.Now()) || len(ids) > 0 && !slices.Contains(ids, t.Image) {
				continue
			}
			percent, err := k.StoreProgress(ctx, t)
			if err != nil {
				return err
			}
			text := fmt.Sprintf("%s  %-10s  %3d%%  %s/%s", t.Image, t.State, percent, t.Bucket, t.Key)
			if t.Reason != "" {
				text += "  " + t.Reason
			}
			if err := a.ui.Result("store_task", text, storedFields(t, percent)); err != nil {
				return err
			}
		}
		return nil
	})
}
