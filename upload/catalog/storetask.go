package catalog

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode"

	"github.com/instar-image/instar/upload"
	"github.com/instar-image/instar/upload/catalog/lease"
	"github.com/instar-image/instar/upload/catalog/stored"
)

// StoreTask is the task of storing an image as one object.
type StoreTask struct {
	Image   string    `json:"image"`
	Owner   string    `json:"owner"` // of the task: the account that asked
	Bucket  string    `json:"bucket"`
	Key     string    `json:"key"`
	Tags    Tags      `json:"tags,omitempty"` // of the object
	State   TaskState `json:"state"`
	Reason  string    `json:"reason,omitempty"` // of a failure
	Size    int64     `json:"size,omitempty"`   // of the object, when it is there
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended,omitzero"`
}

// TaskState is EC2's storeTaskState.
type TaskState string

// The states of a task: in progress until one of the other two.
const (
	InProgress TaskState = "InProgress"
	Completed  TaskState = "Completed"
	TaskFailed TaskState = "Failed"
)

// StoreTaskLife is how long a task that has ended is told of, and how long one may
// take.
const StoreTaskLife = 31 * 24 * time.Hour

func (t *StoreTask) key() string { return storeKey(t.Owner, t.Image, t.Bucket, t.Key) }

// ID tells the task from the others of its account.
func (t *StoreTask) ID() string { return strings.TrimPrefix(t.key(), keyStore+t.Owner+"/") }

func storeKey(owner, image, bucket, key string) string {
	return keyStore + owner + "/" + image + "/" + digestOf(bucket+"/"+key)
}

// lease is the name of the lease of whoever is at it.
func (t *StoreTask) lease() string { return "store-" + t.Image + "-" + digestOf(t.key())[:32] }

func (t *StoreTask) check() error {
	if err := CheckBucket(t.Bucket); err != nil {
		return err
	}
	if err := upload.CheckKey(t.Key); err != nil {
		return err
	}
	if !imageID.MatchString(t.Image) || t.Size < 0 || t.Size > maxNumber {
		return fmt.Errorf("the task of image %q, %d bytes", clip(t.Image), t.Size)
	}
	return errors.Join(CheckAccount(t.Owner), checkObjectTags(t.Tags), checkText("key", t.Key, 1, 1024), checkText("reason", t.Reason, 0, 1024),
		oneOf("state", string(t.State), string(InProgress), string(Completed), string(TaskFailed)), checkTime("started", t.Started),
		checkTimes(map[string]time.Time{"ended": t.Ended}))
}

// checkObjectTags is for an object's tags, of which S3 has at most 10, of letters,
// digits, blanks and a few signs.
func checkObjectTags(t Tags) error {
	if len(t) > 10 {
		return fmt.Errorf("%d tags are more than the 10 that an object may have", len(t))
	}
	strange := func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune(" +-=._:/@", r)
	}
	for k, v := range t {
		if strings.HasPrefix(strings.ToLower(k), "aws:") {
			return fmt.Errorf("tag keys beginning with aws: are reserved: %q", clip(k))
		}
		if strings.ContainsFunc(k+v, strange) {
			return fmt.Errorf("an object's tag has letters, digits, blanks and + - = . _ : / @: %q=%q has more", clip(k), clip(v))
		}
	}
	return t.check()
}

// StoreTasks are an account's tasks, by image and place; those of all accounts if
// account is "".
func (l Lookup) StoreTasks(ctx context.Context, account string) ([]*StoreTask, error) {
	prefix := keyStore
	if account != "" {
		prefix += account + "/"
	}
	var all []*StoreTask
	for e, err := range l.s.scan(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		all = append(all, e.StoreTask)
	}
	return all, nil
}

// StoreProgress is how far a task is, in percent; of one under way by the word of
// whoever is at it.
func (c *Catalog) StoreProgress(ctx context.Context, t *StoreTask) (int, error) {
	switch t.State {
	case Completed:
		return 100, nil
	case TaskFailed:
		return 0, nil
	}
	n, err := lease.Percent(ctx, c.objects, t.lease())
	return min(n, 99), err
}

// Old says that a task need not be told of any more.
func (t *StoreTask) Old(now time.Time) bool {
	return t.State != InProgress && now.Sub(t.Ended) > StoreTaskLife
}

// forgetStored forgets tasks that ended long ago.
func (t *Tx) forgetStored(ctx context.Context) error {
	all, err := t.StoreTasks(ctx, "")
	for _, s := range all {
		if s.Old(t.at) {
			t.delete(s.key())
		}
	}
	return err
}

// StoreRequest is what CreateStoreImageTask is asked for.
type StoreRequest struct {
	ImageID string
	Bucket  string // BUCKET or BUCKET/PREFIX
	Tags    Tags   // of the object
}

// StoredName is the name of the object that an image is stored as.
func StoredName(id string) string { return id + ".bin" }

// storable finds an image that an account may store: its own, or one that was
// shared with it by name.
func (l Lookup) storable(ctx context.Context, account, id string) (*Image, error) {
	m, err := l.See(ctx, account, id)
	switch {
	case err != nil:
		return nil, err
	case m.Owner != account && !m.Shared(account):
		return nil, refuse(CodeAuthFailure, "The image '%s' is not your own, and not shared with you by name", id)
	case m.State != Available:
		return nil, refuse(CodeState, "The image '%s' is %s: only one that is available is stored", id, m.State)
	case m.Kind == KindNone:
		return nil, refuse(CodeParameterValue, "The image '%s' is a record without bytes: there is nothing to store", id)
	}
	return m, nil
}

// Store begins to store an image as one object, IMAGE.bin in a bucket (SPEC.md of
// package stored): it puts the task, which [Catalog.CompleteStore] carries out. One
// that is under way already is given as it is. That the bucket can be written
// is found out first.
func (c *Catalog) Store(ctx context.Context, call Call, r StoreRequest) (*StoreTask, error) {
	if err := CheckAccount(call.Account); err != nil {
		return nil, err
	}
	bucket, prefix, _ := strings.Cut(strings.Trim(r.Bucket, "/"), "/")
	if err := CheckBucket(bucket); err != nil {
		return nil, err
	}
	key := path.Join(prefix, StoredName(r.ImageID))
	if err := checkObjectTags(r.Tags); err != nil {
		return nil, &Error{Code: CodeParameterValue, Message: "These tags are not allowed", Err: err}
	}
	if err := c.Read(ctx, func(v *View) error { _, err := v.storable(ctx, call.Account, r.ImageID); return err }); err != nil {
		if call.DryRun {
			err = DryRun(err)
		}
		return nil, err
	}
	if err := upload.CheckKey(key); err != nil {
		return nil, &Error{Code: CodeParameterValue, Message: "The object could not have its name", Err: err}
	}
	if !call.DryRun {
		if err := c.writable(ctx, bucket, key, r); err != nil {
			return nil, err
		}
	}
	var task *StoreTask
	err := c.run(ctx, call, func(t *Tx) error {
		task = nil
		if _, err := t.storable(ctx, call.Account, r.ImageID); err != nil {
			return err
		}
		e, err := t.entry(ctx, storeKey(call.Account, r.ImageID, bucket, key))
		if err != nil {
			return err
		}
		if e != nil && e.StoreTask.State == InProgress {
			if requestDigest(e.StoreTask.Tags) != requestDigest(r.Tags) {
				return refuse(CodeState, "The image '%s' is being stored in %s already, with other tags", r.ImageID, bucket)
			}
			task = e.StoreTask
			return nil
		}
		task = &StoreTask{Image: r.ImageID, Owner: call.Account, Bucket: bucket, Key: key, Tags: r.Tags, State: InProgress, Started: t.at}
		return t.set(&entry{Key: task.key(), StoreTask: task})
	})
	if err != nil {
		return nil, err
	}
	return task, nil
}

// writable finds out whether the object can be put.
func (c *Catalog) writable(ctx context.Context, bucket, key string, r StoreRequest) (err error) {
	s, err := c.bucket(ctx, bucket)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := c.replaceable(ctx, s, key, r.ImageID); err != nil {
		return asBucket(ctx, bucket, err)
	}
	_, err = upload.CheckWritable(ctx, s, upload.PutOptions{Tags: r.Tags})
	return asBucket(ctx, bucket, err)
}

// bucket opens a bucket that objects of whole images are in.
func (c *Catalog) bucket(ctx context.Context, name string) (upload.Store, error) {
	if c.opt.Bucket == nil {
		return nil, refuse(CodeParameterValue, "This catalog has no way to open the bucket %q", clip(name))
	}
	s, err := c.opt.Bucket(ctx, name)
	return s, asBucket(ctx, name, err)
}

// CodeNoBucket is EC2's for a bucket that is not there.
const CodeNoBucket = "InvalidS3Bucket.NotFound"

// asBucket tells what is wrong with a bucket, or the right to use it, from what is
// wrong with the way to it.
func asBucket(ctx context.Context, bucket string, err error) error {
	if err == nil || ctx.Err() != nil || isRefusal(err) {
		return err
	}
	for _, k := range []struct {
		kind      error
		code, say string
	}{
		{upload.ErrNoBucket, CodeNoBucket, "The bucket %q does not exist"},
		{upload.ErrAccess, CodeAuthFailure, "The bucket %q may not be used"},
		{upload.ErrUnsupported, CodeParameterValue, "The bucket %q cannot do what is asked for"},
		{upload.ErrBucketElsewhere, CodeParameterValue, "The bucket %q is in another region"},
		{upload.ErrTooLarge, CodeParameterValue, "The bucket %q takes no object that large"},
		{upload.ErrNotExist, CodeParameterValue, "There is no such object in the bucket %q"},
		{stored.ErrFormat, CodeParameterValue, "The object in the bucket %q is no stored image"},
	} {
		if errors.Is(err, k.kind) {
			return &Error{Code: k.code, Message: fmt.Sprintf(k.say, clip(bucket)), Err: err}
		}
	}
	return err
}

// replaceable refuses to put an object in the place of one that is something
// else than the same image, or says so unsigned.
func (c *Catalog) replaceable(ctx context.Context, s upload.Store, key, id string) error {
	if _, err := s.Stat(ctx, key); errors.Is(err, upload.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	taken := refuse(CodeParameterValue, "The object %q is there already and is not the image '%s': it is left as it is", clip(key), id)
	o, err := stored.Open(ctx, s, key)
	if errors.Is(err, stored.ErrFormat) {
		return taken
	}
	if err != nil {
		return err
	}
	if h, err := openStored(o.Head, c.opt.Trust); err != nil || h.Image.ID != id {
		return taken
	}
	return nil
}
