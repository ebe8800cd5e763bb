package main

import (
	"context"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// patience is how long a waiter waits.
const patience = 2 * time.Minute

// The SDK's waiters and paginators ask through these.

// DescribeImages asks and notes the answer.
func (c *caller) DescribeImages(_ context.Context, in *ec2.DescribeImagesInput, _ ...func(*ec2.Options)) (*ec2.DescribeImagesOutput, error) {
	return ask(c, c.ec2.DescribeImages, in)
}

// DescribeTags asks and notes the answer.
func (c *caller) DescribeTags(_ context.Context, in *ec2.DescribeTagsInput, _ ...func(*ec2.Options)) (*ec2.DescribeTagsOutput, error) {
	return ask(c, c.ec2.DescribeTags, in)
}

// DescribeKeyPairs asks and notes the answer.
func (c *caller) DescribeKeyPairs(_ context.Context, in *ec2.DescribeKeyPairsInput, _ ...func(*ec2.Options)) (*ec2.DescribeKeyPairsOutput, error) {
	return ask(c, c.ec2.DescribeKeyPairs, in)
}

// DescribeBundleTasks asks and notes the answer.
func (c *caller) DescribeBundleTasks(_ context.Context, in *ec2.DescribeBundleTasksInput, _ ...func(*ec2.Options)) (*ec2.DescribeBundleTasksOutput, error) {
	return ask(c, c.ec2.DescribeBundleTasks, in)
}

// waited is called when a waiter has ended: the last of its requests stays in the
// record, for how many there were, and what they found on its way, is chance.
func (c *caller) waited(name string) {
	d := c.d
	d.calls["wait "+name]++
	last := len(d.lines) - 1
	first := last
	for first > 0 && d.lines[first-1].Body == d.lines[last].Body && d.lines[first-1].Region == d.lines[last].Region {
		first--
	}
	d.lines[last].Waited = true
	d.lines = append(d.lines[:first], d.lines[last])
}

func (d *driver) waitImage(c *caller, id string, ok bool) {
	err := ec2.NewImageExistsWaiter(c, func(o *ec2.ImageExistsWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second, time.Second }).Wait(d.ctx, &ec2.DescribeImagesInput{ImageIds: []string{id}, Filters: filter("image-id", id)}, patience)
	if err != nil {
		d.fault("ImageExists: %v", err)
	}
	c.waited("ImageExists")
	err = ec2.NewImageAvailableWaiter(c, func(o *ec2.ImageAvailableWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second, time.Second }).Wait(d.ctx, &ec2.DescribeImagesInput{ImageIds: []string{id}}, patience)
	switch {
	case ok && err != nil:
		d.fault("ImageAvailable: %v", err)
	case !ok && (err == nil || !strings.Contains(err.Error(), "Failure")):
		d.fault("ImageAvailable of an image that failed: %v", err)
	}
	c.waited("ImageAvailable")
}

func (d *driver) waitBundle(id string, ok bool) {
	err := ec2.NewBundleTaskCompleteWaiter(d.alice, func(o *ec2.BundleTaskCompleteWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second, time.Second }).Wait(d.ctx, &ec2.DescribeBundleTasksInput{BundleIds: []string{id}}, patience)
	switch {
	case ok && err != nil:
		d.fault("BundleTaskComplete: %v", err)
	case !ok && (err == nil || !strings.Contains(err.Error(), "Failure")):
		d.fault("BundleTaskComplete of a task that was cancelled: %v", err)
	}
	d.alice.waited("BundleTaskComplete")
}

func (d *driver) copying(name string) *ec2.CopyImageInput {
	return &ec2.CopyImageInput{Name: aws.String(name), SourceImageId: aws.String(d.source), SourceRegion: aws.String(d.region)}
}

// copies copies an image to the other region.
func (d *driver) copies() {
	c := d.there.ec2
	in := d.copying("a copy")
	in.Description, in.ClientToken, in.CopyImageTags, in.Encrypted = aws.String("copied"), aws.String("4f6a0a3e-8a7e-4c8e-9a53-5f6d6c5b1c11"), aws.Bool(true), aws.Bool(false)
	in.TagSpecifications = tags(types.ResourceTypeImage, "copy", "yes")
	id := aws.ToString(done(d.there, c.CopyImage, in).ImageId)
	is(d, "the same copy again", aws.ToString(done(d.there, c.CopyImage, in).ImageId), id)
	other := d.copying("another name")
	other.ClientToken = in.ClientToken
	refused(d.there, "IdempotentParameterMismatch", c.CopyImage, other)
	d.waitImage(d.there, id, true)
	m := d.there.described(id)
	is(d, "the copy's source", aws.ToString(m.SourceImageId)+" "+aws.ToString(m.SourceImageRegion), d.source+" "+d.region)
	is(d, "the copy's tags", len(m.Tags), 4)
	is(d, "the copy's description", aws.ToString(m.Description), "copied")

	for _, change := range []func(in *ec2.CopyImageInput){
		func(in *ec2.CopyImageInput) { in.DestinationAvailabilityZone = aws.String("us-home-1a") },
		func(in *ec2.CopyImageInput) { in.DestinationAvailabilityZoneId = aws.String("ush1-az1") },
		func(in *ec2.CopyImageInput) {
			in.DestinationOutpostArn = aws.String("arn:aws:outposts:us-home-1:111122223333:outpost/op-1")
		},
		func(in *ec2.CopyImageInput) { in.SnapshotCopyCompletionDurationMinutes = aws.Int64(15) },
	} {
		in := d.copying("strange")
		change(in)
		refused(d.there, "UnknownParameter", c.CopyImage, in)
	}
	sealed := d.copying("sealed")
	sealed.KmsKeyId = aws.String("a-key")
	refused(d.there, "InvalidParameterCombination", c.CopyImage, sealed)
	far := d.copying("far")
	far.SourceRegion = aws.String("moon-1")
	refused(d.there, "InvalidParameterValue", c.CopyImage, far)
	hidden := d.copying("hidden")
	refused(d.bobThere, "InvalidAMIID.NotFound", d.bobThere.ec2.CopyImage, hidden)
}

func (d *driver) bundling(instance string) *ec2.BundleInstanceInput {
	return &ec2.BundleInstanceInput{InstanceId: aws.String(instance), Storage: &types.Storage{S3: &types.S3Storage{Bucket: aws.String(d.bucket), Prefix: aws.String("p")}}}
}

// bundles has machines bundled and imaged.
func (d *driver) bundles() {
	c := d.alice.ec2
	in := d.bundling("i-agent")
	in.Storage.S3.AWSAccessKeyId, in.Storage.S3.UploadPolicySignature = aws.String("AKALICE"), aws.String("bm90aGluZw==")
	in.Storage.S3.UploadPolicy = []byte(`{"expiration": "2099-01-01T00:00:00Z", "conditions": [{"acl": "ec2-bundle-read"}, {"bucket": "` + d.bucket + `"}, ["starts-with", "$key", "p"]]}`)
	id := aws.ToString(done(d.alice, c.BundleInstance, in).BundleTask.BundleId)
	d.waitBundle(id, true)

	task := done(d.alice, c.BundleInstance, d.bundling("i-away")).BundleTask
	is(d, "a new task's state", task.State, types.BundleTaskStatePending)
	is(d, "where it goes", aws.ToString(task.Storage.S3.Bucket)+"/"+aws.ToString(task.Storage.S3.Prefix), d.bucket+"/p")
	refused(d.alice, "BundlingInProgress", c.BundleInstance, d.bundling("i-away"))
	done(d.alice, c.DescribeBundleTasks, &ec2.DescribeBundleTasksInput{Filters: filter("state", "pending", "s3-bucket", d.bucket)})
	cancelled := done(d.alice, c.CancelBundleTask, &ec2.CancelBundleTaskInput{BundleId: task.BundleId}).BundleTask
	is(d, "a cancelled task's error", cancelled.BundleTaskError != nil && aws.ToString(cancelled.BundleTaskError.Code) == "Client.Cancelled", true)
	d.waitBundle(aws.ToString(task.BundleId), false)
	refused(d.alice, "IncorrectState", c.CancelBundleTask, &ec2.CancelBundleTaskInput{BundleId: task.BundleId})
	refused(d.bob, "InvalidBundleId.NotFound", d.bob.ec2.DescribeBundleTasks, &ec2.DescribeBundleTasksInput{BundleIds: []string{id}})
	refused(d.alice, "InvalidInstanceID.NotFound", c.BundleInstance, d.bundling("i-bob"))
	refused(d.alice, "InvalidInstanceID.Malformed", c.BundleInstance, d.bundling("../x"))

	image := func(instance, name string) *ec2.CreateImageInput {
		return &ec2.CreateImageInput{InstanceId: aws.String(instance), Name: aws.String(name)}
	}
	full := image("i-away", "made of a machine")
	full.Description, full.NoReboot, full.BlockDeviceMappings, full.TagSpecifications = aws.String("d"), aws.Bool(true), devices(), tags(types.ResourceTypeImage, "k", "v")
	pending := d.alice.described(aws.ToString(done(d.alice, c.CreateImage, full).ImageId))
	is(d, "an image on its way", string(pending.State)+" "+aws.ToString(pending.SourceInstanceId), "pending i-away")
	d.waitImage(d.alice, aws.ToString(done(d.alice, c.CreateImage, image("i-agent", "never made")).ImageId), false)
	override, where := image("i-away", "strange"), image("i-away", "strange")
	override.BootModeOverride, where.SnapshotLocation = types.BootModeOverrideValuesUefi, types.SnapshotLocationEnumRegional
	refused(d.alice, "UnknownParameter", c.CreateImage, override)
	refused(d.alice, "UnknownParameter", c.CreateImage, where)
	for _, s := range strange() {
		in := image("i-away", "strange")
		in.BlockDeviceMappings = s
		refused(d.alice, "UnknownParameter", c.CreateImage, in)
	}
}

// DescribeStoreImageTasks asks and notes the answer.
func (c *caller) DescribeStoreImageTasks(_ context.Context, in *ec2.DescribeStoreImageTasksInput, _ ...func(*ec2.Options)) (*ec2.DescribeStoreImageTasksOutput, error) {
	return ask(c, c.ec2.DescribeStoreImageTasks, in)
}

// stores makes objects of images and images of objects.
func (d *driver) stores() {
	c := d.alice.ec2
	var key *string
	for _, bucket := range []string{d.bucket, d.bucket2} {
		in := &ec2.CreateStoreImageTaskInput{ImageId: aws.String(d.source), Bucket: aws.String(bucket), S3ObjectTags: []types.S3ObjectTag{{Key: aws.String("k"), Value: aws.String("v + w")}}}
		key = done(d.alice, c.CreateStoreImageTask, in).ObjectKey
		is(d, "the object's key", aws.ToString(key), d.source+".bin")
	}
	err := ec2.NewStoreImageTaskCompleteWaiter(d.alice, func(o *ec2.StoreImageTaskCompleteWaiterOptions) { o.MinDelay, o.MaxDelay = time.Second, time.Second }).
		Wait(d.ctx, &ec2.DescribeStoreImageTasksInput{ImageIds: []string{d.source}}, patience)
	if err != nil {
		d.fault("StoreImageTaskComplete: %v", err)
	}
	d.alice.waited("StoreImageTaskComplete")
	pages, seen := 0, 0
	for p := ec2.NewDescribeStoreImageTasksPaginator(d.alice, &ec2.DescribeStoreImageTasksInput{Filters: filter("task-state", "Completed")}, func(o *ec2.DescribeStoreImageTasksPaginatorOptions) { o.Limit = 1 }); p.HasMorePages(); pages++ {
		out, err := p.NextPage(d.ctx)
		if err != nil {
			d.fault("a page of store tasks: %v", err)
			return
		}
		for _, t := range out.StoreImageTaskResults {
			is(d, "a store task's progress", aws.ToInt32(t.ProgressPercentage), 100)
			is(d, "a store task has a time", t.TaskStartTime != nil, true)
			seen++
		}
	}
	is(d, "store tasks on pages", seen, 2)
	is(d, "pages of store tasks", pages, 2)

	restored := aws.ToString(done(d.alice, c.CreateRestoreImageTask, &ec2.CreateRestoreImageTaskInput{
		Bucket: aws.String(d.bucket), ObjectKey: key, Name: aws.String("restored"), TagSpecifications: tags(types.ResourceTypeImage, "restored", "yes"),
	}).ImageId)
	d.waitImage(d.alice, restored, true)
	m := d.alice.described(restored)
	is(d, "the restored image's kind", string(m.RootDeviceType)+" "+string(m.Architecture), "instance-store i386")
	refused(d.alice, "InvalidParameterValue", c.CreateStoreImageTask, &ec2.CreateStoreImageTaskInput{
		ImageId: aws.String(d.source), Bucket: aws.String(d.bucket), S3ObjectTags: []types.S3ObjectTag{{Key: aws.String("k"), Value: aws.String("v & w")}},
	})
	refused(d.alice, "InvalidParameterValue", c.CreateStoreImageTask, &ec2.CreateStoreImageTaskInput{ImageId: aws.String(d.id), Bucket: aws.String(d.bucket)})
	refused(d.alice, "AuthFailure", c.CreateStoreImageTask, &ec2.CreateStoreImageTaskInput{ImageId: aws.String(d.source), Bucket: aws.String("theirs")})
	refused(d.bob, "AuthFailure", d.bob.ec2.CreateRestoreImageTask, &ec2.CreateRestoreImageTaskInput{Bucket: aws.String(d.bucket), ObjectKey: key})
	refused(d.alice, "InvalidParameterCombination", c.DescribeStoreImageTasks, &ec2.DescribeStoreImageTasksInput{ImageIds: []string{d.source}, MaxResults: aws.Int32(5)})
}
