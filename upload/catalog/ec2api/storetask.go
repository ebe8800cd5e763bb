package ec2api

import (
	"context"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/instar-image/instar/upload/catalog"
)

type createStoreImageTask struct {
	imageOnly
	Bucket      string `q:"Bucket!"`
	S3ObjectTag []tagParam
}

type createStoreImageTaskReply struct {
	head
	ObjectKey string `xml:"objectKey"`
}

// mayUse says whether the account may have objects put into a bucket, and images
// restored from it.
func (a *account) mayUse(bucket string, dryRun bool) error {
	name, _, _ := strings.Cut(strings.Trim(bucket, "/"), "/")
	if a.uses(name) {
		return nil
	}
	err := refuse(catalog.CodeAuthFailure, "Not authorized for images: the account may not use the bucket %.100q", name)
	if dryRun {
		return catalog.DryRun(err)
	}
	return err
}

func (s *Server) createStoreImageTask(ctx context.Context, c *call, in *createStoreImageTask) (reply, error) {
	tags := catalog.Tags{}
	if err := addTags(tags, in.S3ObjectTag); err != nil {
		return nil, err
	}
	if len(tags) == 0 {
		tags = nil
	}
	if err := c.account.mayUse(in.Bucket, in.DryRun); err != nil {
		return nil, err
	}
	if err := s.roomFor(ctx, c.account.id); err != nil {
		return nil, err
	}
	t, err := s.o.Catalog.Store(ctx, c.as(in.DryRun), catalog.StoreRequest{ImageID: in.ImageID, Bucket: in.Bucket, Tags: tags})
	if err != nil {
		return nil, err
	}
	s.begun()
	return &createStoreImageTaskReply{ObjectKey: t.Key}, nil
}

type describeStoreImageTasks struct {
	dry
	paging
	ImageID []string `q:"ImageId"`
	Filter  []filter
}

type storeTaskItem struct {
	AmiID                  string `xml:"amiId"`
	TaskStartTime          string `xml:"taskStartTime"`
	Bucket                 string `xml:"bucket"`
	S3objectKey            string `xml:"s3objectKey"`
	ProgressPercentage     int    `xml:"progressPercentage"`
	StoreTaskState         string `xml:"storeTaskState"`
	StoreTaskFailureReason string `xml:"storeTaskFailureReason,omitempty"`
}

type describeStoreImageTasksReply struct {
	head
	StoreImageTaskResultSet items[storeTaskItem] `xml:"storeImageTaskResultSet"`
	NextToken               string               `xml:"nextToken,omitempty"`
}

// EC2's limits of what is asked for at once.
const (
	maxStoreTasks  = 200 // on a page
	maxStoreImages = 20  // by id
)

func (in *describeStoreImageTasks) check() error {
	switch {
	case len(in.ImageID) > 0 && (in.MaxResults != nil || in.NextToken != ""):
		return refuse(catalog.CodeCombination, "The parameter MaxResults cannot be used with the parameter ImageId")
	case len(in.ImageID) > maxStoreImages:
		return refuse(catalog.CodeParameterValue, "At most %d image ids are asked for at once, not %d", maxStoreImages, len(in.ImageID))
	case in.MaxResults != nil && *in.MaxResults > maxStoreTasks:
		return refuse(catalog.CodeParameterValue, "value (%d) for parameter MaxResults is invalid: it must be 1 to %d", *in.MaxResults, maxStoreTasks)
	}
	for _, id := range in.ImageID {
		if err := catalog.CheckID(id); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) describeStoreImageTasks(ctx context.Context, c *call, in *describeStoreImageTasks) (reply, error) {
	if err := in.check(); err != nil {
		return nil, err
	}
	match, err := newMatcher(in.Filter, "task-state", "bucket")
	if err != nil {
		return nil, err
	}
	var all []*catalog.StoreTask
	err = s.o.Catalog.Read(ctx, func(v *catalog.View) (err error) {
		all, err = v.StoreTasks(ctx, c.account.id)
		return err
	})
	if err != nil {
		return nil, err
	}
	wanted := make(map[string]bool, len(in.ImageID))
	for _, id := range in.ImageID {
		wanted[id] = true
	}
	var found []*catalog.StoreTask
	for _, t := range all {
		if !t.Old(s.o.Now()) && (len(wanted) == 0 || wanted[t.Image]) && match.all(func(name string) []string {
			return map[string][]string{"task-state": {string(t.State)}, "bucket": {t.Bucket}}[name]
		}) {
			found = append(found, t)
		}
	}
	out := &describeStoreImageTasksReply{}
	if found, out.NextToken, err = page(c, &in.paging, found, (*catalog.StoreTask).ID); err != nil {
		return nil, err
	}
	out.StoreImageTaskResultSet.Item = make([]storeTaskItem, len(found))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, t := range found {
		g.Go(func() (err error) {
			item := storeTaskItem{
				AmiID: t.Image, TaskStartTime: timestamp(t.Started), Bucket: t.Bucket, S3objectKey: t.Key,
				StoreTaskState: string(t.State), StoreTaskFailureReason: t.Reason,
			}
			item.ProgressPercentage, err = s.o.Catalog.StoreProgress(gctx, t)
			out.StoreImageTaskResultSet.Item[i] = item
			return err
		})
	}
	return out, g.Wait()
}

type createRestoreImageTask struct {
	dry
	Bucket           string `q:"Bucket!"`
	ObjectKey        string `q:"ObjectKey!"`
	Name             string
	TagSpecification []tagSpecification
}

func (s *Server) createRestoreImageTask(ctx context.Context, c *call, in *createRestoreImageTask) (reply, error) {
	tags, err := tagsOf(in.TagSpecification, "image", "snapshot")
	if err != nil {
		return nil, err
	}
	if err := c.account.mayUse(in.Bucket, in.DryRun); err != nil {
		return nil, err
	}
	bucket, folder, _ := strings.Cut(strings.Trim(in.Bucket, "/"), "/")
	key := in.ObjectKey
	if folder != "" {
		key = folder + "/" + key
	}
	if err := s.roomFor(ctx, c.account.id); err != nil {
		return nil, err
	}
	m, err := s.o.Catalog.Restore(ctx, c.as(in.DryRun), catalog.RestoreRequest{
		Bucket: bucket, Key: key, Name: in.Name, Tags: tags,
		// It becomes the account's own at a location that others may have.
		Check: func(_ context.Context, location string) error {
			err := c.account.mayRegister(location)
			if in.DryRun {
				err = catalog.DryRun(err)
			}
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	s.begun()
	return &imageIDReply{ImageID: m.ID}, nil
}
