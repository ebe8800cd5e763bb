package main

import (
	"context"
	"net/http"
	"reflect"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"github.com/aws/aws-sdk-go-v2/service/sts"
)

// strangers asks with keys and for regions that are not right.
func (d *driver) strangers() {
	wrong := d.caller("AKALICE", "another secret", "", d.url, d.region)
	refused(wrong, "AuthFailure", wrong.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
	refused(wrong, "InvalidClientTokenId", wrong.sts.GetCallerIdentity, &sts.GetCallerIdentityInput{})
	nobody := d.caller("AKNOBODY", "alice-secret-key", "", d.url, d.region)
	refused(nobody, "AuthFailure", nobody.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
	token := d.caller("AKTEMP", "temporary-secret-key", "another token", d.url, d.region)
	refused(token, "AuthFailure", token.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
	elsewhere := d.caller("AKALICE", "alice-secret-key", "", d.url, "moon-1")
	elsewhere.wire.region = d.region // whose server is asked
	refused(elsewhere, "SignatureDoesNotMatch", elsewhere.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
}

// losing makes a call whose first answer gets lost, after which the SDK tries
// again by itself.
func losing(c *caller, f func()) {
	before := len(c.d.lines)
	c.wire.lose = 1
	f()
	is(c.d, "requests of a call whose first answer was lost", len(c.d.lines)-before, 2)
	c.wire.lose = 0
}

// answersLost: what was done and looks as if it was not. With a token, or by its
// nature, it is done once; a name that is taken says so.
func (d *driver) answersLost() {
	c := d.alice.ec2
	var id string
	losing(d.there, func() { // the SDK makes a token
		id = aws.ToString(done(d.there, d.there.ec2.CopyImage, d.copying("copied once")).ImageId)
	})
	d.waitImage(d.there, id, true)
	is(d, "copies of that name", len(done(d.there, d.there.ec2.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("name", "copied once")}).Images), 1)
	losing(d.alice, func() {
		refused(d.alice, "InvalidAMIName.Duplicate", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("registered once"), RootDeviceName: aws.String("/dev/sda1")})
	})
	once := done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("name", "registered once")}).Images
	if len(once) != 1 {
		d.fault("%d images were registered", len(once))
		return
	}
	losing(d.alice, func() {
		done(d.alice, c.CreateTags, &ec2.CreateTagsInput{Resources: []string{d.id}, Tags: []types.Tag{{Key: aws.String("twice"), Value: aws.String("the same")}}})
	})
	losing(d.alice, func() {
		done(d.alice, c.ModifyImageAttribute, &ec2.ModifyImageAttributeInput{ImageId: once[0].ImageId, LaunchPermission: &types.LaunchPermissionModifications{Add: []types.LaunchPermission{{UserId: aws.String(bob)}}}})
	})
	losing(d.alice, func() { done(d.alice, c.DeleteKeyPair, &ec2.DeleteKeyPairInput{KeyName: aws.String("imported")}) })
	losing(d.alice, func() {
		refused(d.alice, "InvalidAMIID.Unavailable", c.DeregisterImage, &ec2.DeregisterImageInput{ImageId: once[0].ImageId})
	})
}

// clocks asks from a machine whose clock is wrong. The SDK finds out by how much,
// signs again, and remembers it.
func (d *driver) clocks() {
	for _, slow := range []time.Duration{time.Hour, -48 * time.Hour} {
		c := d.caller("AKALICE", "alice-secret-key", "", d.url, d.region)
		c.wire.slow = slow
		before := len(d.lines)
		done(c, c.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
		is(d, "requests of a machine whose clock is wrong", len(d.lines)-before, 2)
		done(c, c.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
		is(d, "requests when the SDK knows that", len(d.lines)-before, 3)
		done(c, c.sts.GetCallerIdentity, &sts.GetCallerIdentityInput{})
		is(d, "requests with those to STS", len(d.lines)-before, 5)
	}
	near := d.caller("AKALICE", "alice-secret-key", "", d.url, d.region)
	near.wire.slow = 2 * time.Minute
	before := len(d.lines)
	done(near, near.ec2.DescribeRegions, &ec2.DescribeRegionsInput{})
	is(d, "requests of a machine whose clock is good enough", len(d.lines)-before, 1)

	// A presigned request, which others make.
	signed, err := sts.NewPresignClient(d.alice.sts).PresignGetCallerIdentity(d.ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		d.fault("presigning: %v", err)
		return
	}
	r, err := http.NewRequestWithContext(d.ctx, signed.Method, signed.URL, nil)
	if err != nil {
		d.fault("presigning: %v", err)
		return
	}
	who := done(d.alice, d.alice.sts.GetCallerIdentity, &sts.GetCallerIdentityInput{})
	res, err := d.alice.wire.Do(r)
	if err != nil {
		d.fault("a presigned request: %v", err)
		return
	}
	res.Body.Close()
	d.lines[len(d.lines)-1].Output = typed(who)
	is(d, "the answer to a presigned request", res.StatusCode, http.StatusOK)
}

// trying makes the call with DryRun, as somebody who may and, if it changes
// something, as somebody who may only read.
func trying[In, Out any](c, reader *caller, op func(*ec2.Client, context.Context, *In, ...func(*ec2.Options)) (*Out, error), in *In) {
	reflect.ValueOf(in).Elem().FieldByName("DryRun").Set(reflect.ValueOf(aws.Bool(true)))
	by := func(who *caller) func(context.Context, *In, ...func(*ec2.Options)) (*Out, error) {
		return func(ctx context.Context, in *In, o ...func(*ec2.Options)) (*Out, error) {
			return op(who.ec2, ctx, in, o...)
		}
	}
	refused(c, "DryRunOperation", by(c), in)
	if reader != nil {
		refused(reader, "UnauthorizedOperation", by(reader), in)
	}
}

// dryRuns tries every action.
func (d *driver) dryRuns() {
	id, image := aws.String(d.id), []string{d.id}
	done(d.alice, d.alice.ec2.ModifyImageAttribute, &ec2.ModifyImageAttributeInput{ImageId: id, LaunchPermission: &types.LaunchPermissionModifications{Add: []types.LaunchPermission{{UserId: aws.String(bob)}}}})
	a, r, there := d.alice, d.reader, d.caller("AKREADER", "reader-secret-key", "", d.url2, d.other)
	trying(a, r, (*ec2.Client).RegisterImage, &ec2.RegisterImageInput{Name: aws.String("dry"), RootDeviceName: aws.String("/dev/sda1")})
	trying(a, r, (*ec2.Client).CreateImage, &ec2.CreateImageInput{InstanceId: aws.String("i-away"), Name: aws.String("dry")})
	trying(d.there, there, (*ec2.Client).CopyImage, d.copying("dry"))
	trying(a, r, (*ec2.Client).DeregisterImage, &ec2.DeregisterImageInput{ImageId: id})
	trying(a, nil, (*ec2.Client).DescribeImages, &ec2.DescribeImagesInput{ImageIds: image})
	trying(a, nil, (*ec2.Client).DescribeImageAttribute, &ec2.DescribeImageAttributeInput{ImageId: id, Attribute: types.ImageAttributeNameDescription})
	trying(a, r, (*ec2.Client).ModifyImageAttribute, &ec2.ModifyImageAttributeInput{ImageId: id, Description: &types.AttributeValue{Value: aws.String("dry")}})
	trying(a, r, (*ec2.Client).ResetImageAttribute, &ec2.ResetImageAttributeInput{ImageId: id, Attribute: types.ResetImageAttributeNameLaunchPermission})
	trying(a, r, (*ec2.Client).EnableImage, &ec2.EnableImageInput{ImageId: id})
	trying(a, r, (*ec2.Client).DisableImage, &ec2.DisableImageInput{ImageId: id})
	trying(a, r, (*ec2.Client).EnableImageDeprecation, &ec2.EnableImageDeprecationInput{ImageId: id, DeprecateAt: aws.Time(d.now.Add(24 * time.Hour))})
	trying(a, r, (*ec2.Client).DisableImageDeprecation, &ec2.DisableImageDeprecationInput{ImageId: id})
	trying(a, r, (*ec2.Client).EnableImageDeregistrationProtection, &ec2.EnableImageDeregistrationProtectionInput{ImageId: id})
	trying(a, r, (*ec2.Client).DisableImageDeregistrationProtection, &ec2.DisableImageDeregistrationProtectionInput{ImageId: id})
	trying(d.bob, r, (*ec2.Client).CancelImageLaunchPermission, &ec2.CancelImageLaunchPermissionInput{ImageId: id})
	trying(a, r, (*ec2.Client).CreateTags, &ec2.CreateTagsInput{Resources: image, Tags: []types.Tag{{Key: aws.String("dry")}}})
	trying(a, r, (*ec2.Client).DeleteTags, &ec2.DeleteTagsInput{Resources: image})
	trying(a, nil, (*ec2.Client).DescribeTags, &ec2.DescribeTagsInput{})
	trying(a, r, (*ec2.Client).CreateKeyPair, &ec2.CreateKeyPairInput{KeyName: aws.String("dry"), KeyType: types.KeyTypeEd25519})
	trying(a, r, (*ec2.Client).ImportKeyPair, &ec2.ImportKeyPairInput{KeyName: aws.String("dry"), PublicKeyMaterial: []byte(publicKey)})
	trying(a, nil, (*ec2.Client).DescribeKeyPairs, &ec2.DescribeKeyPairsInput{})
	trying(a, r, (*ec2.Client).DeleteKeyPair, &ec2.DeleteKeyPairInput{KeyName: aws.String("made")})
	trying(a, nil, (*ec2.Client).DescribeRegions, &ec2.DescribeRegionsInput{})
	trying(a, nil, (*ec2.Client).DescribeAvailabilityZones, &ec2.DescribeAvailabilityZonesInput{})
	trying(a, r, (*ec2.Client).BundleInstance, d.bundling("i-away"))
	trying(a, nil, (*ec2.Client).DescribeBundleTasks, &ec2.DescribeBundleTasksInput{})
	trying(a, r, (*ec2.Client).CreateStoreImageTask, &ec2.CreateStoreImageTaskInput{ImageId: aws.String(d.source), Bucket: aws.String(d.bucket)})
	trying(a, nil, (*ec2.Client).DescribeStoreImageTasks, &ec2.DescribeStoreImageTasksInput{})
	trying(a, r, (*ec2.Client).CreateRestoreImageTask, &ec2.CreateRestoreImageTaskInput{Bucket: aws.String(d.bucket), ObjectKey: aws.String(d.source + ".bin"), Name: aws.String("dry")})
	task := done(a, a.ec2.BundleInstance, d.bundling("i-away")).BundleTask
	trying(a, r, (*ec2.Client).CancelBundleTask, &ec2.CancelBundleTaskInput{BundleId: task.BundleId})
	m := a.described(d.id)
	is(d, "what is tried and not done", string(m.State)+" "+aws.ToString(m.Description)+" "+aws.ToString(m.DeregistrationProtection), "available  disabled")
}
