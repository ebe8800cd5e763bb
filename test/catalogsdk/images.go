package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/ec2"
	"github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

func tags(of types.ResourceType, pairs ...string) []types.TagSpecification {
	s := types.TagSpecification{ResourceType: of}
	for i := 0; i+1 < len(pairs); i += 2 {
		s.Tags = append(s.Tags, types.Tag{Key: aws.String(pairs[i]), Value: aws.String(pairs[i+1])})
	}
	return []types.TagSpecification{s}
}

// devices are block device mappings with all that is known of here.
func devices() []types.BlockDeviceMapping {
	return []types.BlockDeviceMapping{
		{DeviceName: aws.String("/dev/sda1"), Ebs: &types.EbsBlockDevice{
			SnapshotId: aws.String("snap-0123456789abcdef0"), VolumeSize: aws.Int32(8), VolumeType: types.VolumeTypeGp3, Iops: aws.Int32(3000),
			Throughput: aws.Int32(125), DeleteOnTermination: aws.Bool(false), Encrypted: aws.Bool(true), KmsKeyId: aws.String("a-key"),
		}},
		{DeviceName: aws.String("/dev/sdb"), VirtualName: aws.String("ephemeral0")},
		{DeviceName: aws.String("/dev/sdc"), NoDevice: aws.String("")},
	}
}

// strange are mappings with what there is none of here.
func strange() [][]types.BlockDeviceMapping {
	var all [][]types.BlockDeviceMapping
	for _, e := range []types.EbsBlockDevice{
		{AvailabilityZone: aws.String("eu-home-1a")},
		{AvailabilityZoneId: aws.String("euh1-az1")},
		{EbsCardIndex: aws.Int32(1)},
		{OutpostArn: aws.String("arn:aws:outposts:eu-home-1:111122223333:outpost/op-1")},
		{VolumeInitializationRate: aws.Int32(100)},
	} {
		e.VolumeSize = aws.Int32(8)
		all = append(all, []types.BlockDeviceMapping{{DeviceName: aws.String("/dev/sdb"), Ebs: &e}})
	}
	return all
}

// register registers a record without bytes.
func (d *driver) register(name string) string {
	return aws.ToString(done(d.alice, d.alice.ec2.RegisterImage, &ec2.RegisterImageInput{Name: aws.String(name), RootDeviceName: aws.String("/dev/sda1"), Architecture: types.ArchitectureValuesX8664}).ImageId)
}

// described is the one image that has an id.
func (c *caller) described(id string) types.Image {
	out := done(c, c.ec2.DescribeImages, &ec2.DescribeImagesInput{ImageIds: []string{id}})
	if len(out.Images) != 1 {
		c.d.fault("%d images have the id %s", len(out.Images), id)
		return types.Image{}
	}
	return out.Images[0]
}

// images registers, shows and ends images.
func (d *driver) images() {
	c := d.alice.ec2
	d.id = d.register("plain")
	full := &ec2.RegisterImageInput{
		Name: aws.String("all of it"), Description: aws.String("<b>d</b> & ü"), Architecture: types.ArchitectureValuesArm64, RootDeviceName: aws.String("/dev/sda1"),
		VirtualizationType: aws.String("hvm"), EnaSupport: aws.Bool(true), SriovNetSupport: aws.String("simple"), BootMode: types.BootModeValuesUefi,
		TpmSupport: types.TpmSupportValuesV20, ImdsSupport: types.ImdsSupportValuesV20, UefiData: aws.String("QU1aTg=="), BillingProducts: []string{"bp-1"},
		KernelId: aws.String("aki-0123456789abcdef0"), RamdiskId: aws.String("ari-0123456789abcdef0"), BlockDeviceMappings: devices(),
		TagSpecifications: tags(types.ResourceTypeImage, "k", "v", "ü", "<&>\"'", "empty", ""),
	}
	d.named = aws.ToString(done(d.alice, c.RegisterImage, full).ImageId)
	d.source = aws.ToString(done(d.alice, c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("of a bundle"), ImageLocation: aws.String(d.location)}).ImageId)

	m := d.alice.described(d.named)
	is(d, "Name", aws.ToString(m.Name), "all of it")
	is(d, "Description", aws.ToString(m.Description), "<b>d</b> & ü")
	is(d, "State", m.State, types.ImageStateAvailable)
	is(d, "Architecture", m.Architecture, types.ArchitectureValuesArm64)
	is(d, "OwnerId", aws.ToString(m.OwnerId), alice)
	is(d, "Public", aws.ToBool(m.Public), false)
	is(d, "RootDeviceType", m.RootDeviceType, types.DeviceTypeEbs)
	is(d, "VirtualizationType", m.VirtualizationType, types.VirtualizationTypeHvm)
	is(d, "BootMode", m.BootMode, types.BootModeValuesUefi)
	is(d, "TpmSupport", m.TpmSupport, types.TpmSupportValuesV20)
	is(d, "ImdsSupport", m.ImdsSupport, types.ImdsSupportValuesV20)
	is(d, "EnaSupport", aws.ToBool(m.EnaSupport), true)
	is(d, "DeregistrationProtection", aws.ToString(m.DeregistrationProtection), "disabled")
	is(d, "the number of tags", len(m.Tags), 3)
	if _, err := time.Parse("2006-01-02T15:04:05.000Z", aws.ToString(m.CreationDate)); err != nil {
		d.fault("CreationDate: %v", err)
	}
	if len(m.BlockDeviceMappings) != 3 {
		d.fault("the mappings are %+v", m.BlockDeviceMappings)
	} else {
		e := m.BlockDeviceMappings[0].Ebs
		is(d, "the volume", fmt.Sprintln(aws.ToInt32(e.VolumeSize), e.VolumeType, aws.ToInt32(e.Iops), aws.ToInt32(e.Throughput), aws.ToBool(e.DeleteOnTermination), aws.ToBool(e.Encrypted), aws.ToString(e.KmsKeyId)),
			"8 gp3 3000 125 false true a-key\n")
		is(d, "VirtualName", aws.ToString(m.BlockDeviceMappings[1].VirtualName), "ephemeral0")
		is(d, "NoDevice", m.BlockDeviceMappings[2].NoDevice != nil, true)
	}
	b := d.alice.described(d.source)
	is(d, "the bundle's root device type", b.RootDeviceType, types.DeviceTypeInstanceStore)
	is(d, "the bundle's location", aws.ToString(b.ImageLocation), d.location)
	is(d, "the bundle's architecture", b.Architecture, types.ArchitectureValuesI386)
	is(d, "the bundle's product codes", len(b.ProductCodes) > 0, true)

	refused(d.alice, "InvalidAMIName.Duplicate", c.RegisterImage, full)
	refused(d.alice, "InvalidAMIName.Malformed", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("a\tb"), RootDeviceName: aws.String("/dev/sda1")})
	refused(d.alice, "MissingParameter", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("nowhere")})
	refused(d.alice, "InvalidManifest", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("nothing"), ImageLocation: aws.String(d.bucket + "/none.manifest.xml")})
	refused(d.alice, "AuthFailure", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("theirs"), ImageLocation: aws.String("theirs/x.manifest.xml")})
	for _, s := range strange() {
		refused(d.alice, "UnknownParameter", c.RegisterImage, &ec2.RegisterImageInput{Name: aws.String("strange"), RootDeviceName: aws.String("/dev/sda1"), BlockDeviceMappings: s})
	}

	gone := d.register("gone soon")
	is(d, "the end of an image", aws.ToBool(done(d.alice, c.DeregisterImage, &ec2.DeregisterImageInput{ImageId: aws.String(gone), DeleteAssociatedSnapshots: aws.Bool(true)}).Return), true)
	refused(d.alice, "InvalidAMIID.Unavailable", c.DescribeImages, &ec2.DescribeImagesInput{ImageIds: []string{gone}})
	refused(d.alice, "InvalidAMIID.NotFound", c.DescribeImages, &ec2.DescribeImagesInput{ImageIds: []string{"ami-00000000000000000"}})
	refused(d.alice, "InvalidAMIID.Malformed", c.DescribeImages, &ec2.DescribeImagesInput{ImageIds: []string{"ami-x"}})
}

// attributes changes images and looks what became of them.
func (d *driver) attributes() {
	c, id := d.alice.ec2, aws.String(d.id)
	show := func(a types.ImageAttributeName) *ec2.DescribeImageAttributeOutput {
		return done(d.alice, c.DescribeImageAttribute, &ec2.DescribeImageAttributeInput{ImageId: aws.String(d.named), Attribute: a})
	}
	for _, a := range types.ImageAttributeName("").Values() {
		show(a)
	}
	is(d, "uefiData", aws.ToString(show(types.ImageAttributeNameUefiData).UefiData.Value), "QU1aTg==")
	is(d, "kernel", aws.ToString(show(types.ImageAttributeNameKernel).KernelId.Value), "aki-0123456789abcdef0")
	refused(d.alice, "InvalidParameterValue", c.DescribeImageAttribute, &ec2.DescribeImageAttributeInput{ImageId: id, Attribute: "colour"})

	modify := func(in ec2.ModifyImageAttributeInput) {
		if in.ImageId == nil {
			in.ImageId = id
		}
		done(d.alice, c.ModifyImageAttribute, &in)
	}
	const org, unit = "arn:aws:organizations::111122223333:organization/o-abcdefghij", "arn:aws:organizations::111122223333:ou/o-abcdefghij/ou-ab12-abcdefgh"
	all := []types.LaunchPermission{{Group: types.PermissionGroupAll}, {UserId: aws.String(bob)}, {OrganizationArn: aws.String(org)}, {OrganizationalUnitArn: aws.String(unit)}}
	permissions := func(want int) {
		out := done(d.alice, c.DescribeImageAttribute, &ec2.DescribeImageAttributeInput{ImageId: id, Attribute: types.ImageAttributeNameLaunchPermission})
		is(d, "the number of launch permissions", len(out.LaunchPermissions), want)
	}
	modify(ec2.ModifyImageAttributeInput{Description: &types.AttributeValue{Value: aws.String("by structure")}})
	modify(ec2.ModifyImageAttributeInput{Attribute: aws.String("description"), Value: aws.String("by name")})
	modify(ec2.ModifyImageAttributeInput{Description: &types.AttributeValue{Value: aws.String("")}})
	modify(ec2.ModifyImageAttributeInput{ImdsSupport: &types.AttributeValue{Value: aws.String("v2.0")}})
	modify(ec2.ModifyImageAttributeInput{ProductCodes: []string{"774F4FF8"}})
	modify(ec2.ModifyImageAttributeInput{LaunchPermission: &types.LaunchPermissionModifications{Add: all}})
	permissions(4)
	modify(ec2.ModifyImageAttributeInput{LaunchPermission: &types.LaunchPermissionModifications{Remove: all}})
	permissions(0)
	modify(ec2.ModifyImageAttributeInput{
		OperationType: types.OperationTypeAdd, UserGroups: []string{"all"}, UserIds: []string{"2222-3333-4444"}, OrganizationArns: []string{org}, OrganizationalUnitArns: []string{unit},
	})
	permissions(4)
	modify(ec2.ModifyImageAttributeInput{Attribute: aws.String("launchPermission"), OperationType: types.OperationTypeRemove, UserGroups: []string{"all"}})
	permissions(3)
	done(d.alice, c.ResetImageAttribute, &ec2.ResetImageAttributeInput{ImageId: id, Attribute: types.ResetImageAttributeNameLaunchPermission})
	permissions(0)
	refused(d.alice, "InvalidParameterValue", c.ResetImageAttribute, &ec2.ResetImageAttributeInput{ImageId: id, Attribute: "kernel"})
	refused(d.alice, "MissingParameter", c.ModifyImageAttribute, &ec2.ModifyImageAttributeInput{ImageId: id})
	refused(d.alice, "InvalidParameterCombination", c.ModifyImageAttribute, &ec2.ModifyImageAttributeInput{
		ImageId: id, Description: &types.AttributeValue{Value: aws.String("x")}, LaunchPermission: &types.LaunchPermissionModifications{Add: all[:1]},
	})
	refused(d.alice, "InvalidAMIAttributeItemValue", c.ModifyImageAttribute, &ec2.ModifyImageAttributeInput{
		ImageId: id, LaunchPermission: &types.LaunchPermissionModifications{Add: []types.LaunchPermission{{UserId: aws.String("nobody")}}},
	})

	done(d.alice, c.DisableImage, &ec2.DisableImageInput{ImageId: id})
	is(d, "a disabled image's state", d.alice.described(d.id).State, types.ImageStateDisabled)
	is(d, "images with that name", len(done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("name", "plain")}).Images), 0)
	is(d, "disabled ones with that name", len(done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("name", "plain"), IncludeDisabled: aws.Bool(true)}).Images), 1)
	done(d.alice, c.EnableImage, &ec2.EnableImageInput{ImageId: id})

	at := d.now.Add(30 * 24 * time.Hour)
	done(d.alice, c.EnableImageDeprecation, &ec2.EnableImageDeprecationInput{ImageId: id, DeprecateAt: aws.Time(at)})
	is(d, "DeprecationTime", aws.ToString(d.alice.described(d.id).DeprecationTime), at.Format("2006-01-02T15:04:05.000Z"))
	done(d.alice, c.DisableImageDeprecation, &ec2.DisableImageDeprecationInput{ImageId: id})
	is(d, "DeprecationTime", d.alice.described(d.id).DeprecationTime, nil)

	on := done(d.alice, c.EnableImageDeregistrationProtection, &ec2.EnableImageDeregistrationProtectionInput{ImageId: id})
	is(d, "protection", aws.ToString(on.Return), "enabled-without-cooldown")
	refused(d.alice, "OperationNotPermitted", c.DeregisterImage, &ec2.DeregisterImageInput{ImageId: id})
	off := done(d.alice, c.DisableImageDeregistrationProtection, &ec2.DisableImageDeregistrationProtectionInput{ImageId: id})
	is(d, "protection", aws.ToString(off.Return), "disabled")
	kept := d.register("kept a day")
	with := done(d.alice, c.EnableImageDeregistrationProtection, &ec2.EnableImageDeregistrationProtectionInput{ImageId: aws.String(kept), WithCooldown: aws.Bool(true)})
	is(d, "protection", aws.ToString(with.Return), "enabled-with-cooldown")
	is(d, "DeregistrationProtection", aws.ToString(d.alice.described(kept).DeregistrationProtection), "enabled-with-cooldown")

	// Shared with bob, who gives it back.
	modify(ec2.ModifyImageAttributeInput{LaunchPermission: &types.LaunchPermissionModifications{Add: []types.LaunchPermission{{UserId: aws.String(bob)}}}})
	is(d, "what bob sees of the tags", len(d.bob.described(d.id).Tags), 0)
	is(d, "what bob may launch", len(done(d.bob, d.bob.ec2.DescribeImages, &ec2.DescribeImagesInput{ExecutableUsers: []string{"self"}}).Images), 1)
	done(d.bob, d.bob.ec2.CancelImageLaunchPermission, &ec2.CancelImageLaunchPermissionInput{ImageId: id})
	refused(d.bob, "InvalidAMIID.NotFound", d.bob.ec2.DescribeImages, &ec2.DescribeImagesInput{ImageIds: []string{d.id}})
}

func filter(pairs ...string) (l []types.Filter) {
	for i := 0; i+1 < len(pairs); i += 2 {
		l = append(l, types.Filter{Name: aws.String(pairs[i]), Values: []string{pairs[i+1]}})
	}
	return l
}

// lists asks for images by what they have, and by pages.
func (d *driver) lists() {
	c := d.alice.ec2
	for _, f := range [][2]string{
		{"architecture", "arm64"},
		{"block-device-mapping.delete-on-termination", "false"},
		{"block-device-mapping.device-name", "/dev/sd?"},
		{"block-device-mapping.snapshot-id", "snap-*"},
		{"block-device-mapping.volume-size", "8"},
		{"block-device-mapping.volume-type", "gp3"},
		{"block-device-mapping.encrypted", "true"},
		{"creation-date", "20*"},
		{"description", "<b>*"},
		{"ena-support", "true"},
		{"hypervisor", "xen"},
		{"image-type", "machine"},
		{"is-public", "false"},
		{"kernel-id", "aki-*"},
		{"ramdisk-id", "ari-*"},
		{"owner-id", alice},
		{"root-device-name", "/dev/sda1"},
		{"root-device-type", "ebs"},
		{"state", "available"},
		{"sriov-net-support", "simple"},
		{"tag:k", "v"},
		{"tag-key", "ü"},
		{"virtualization-type", "hvm"},
	} {
		out := done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: append(filter(f[0], f[1]), filter("name", "all of ??")...)})
		if len(out.Images) != 1 || aws.ToString(out.Images[0].ImageId) != d.named {
			d.fault("by %s=%s: %d images", f[0], f[1], len(out.Images))
		}
	}
	two := []types.Filter{{Name: aws.String("name"), Values: []string{"plain", "of a bundle"}}}
	is(d, "images by either name", len(done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: two}).Images), 2)
	is(d, "images by location", len(done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("manifest-location", d.bucket+"/*", "product-code", "*")}).Images), 1)
	refused(d.alice, "InvalidParameterValue", c.DescribeImages, &ec2.DescribeImagesInput{Filters: filter("colour", "red")})
	is(d, "a stranger's images", len(done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Owners: []string{bob, "nobody"}, IncludeDeprecated: aws.Bool(true)}).Images), 0)

	// Enough for pages, whose order is that of the whole.
	for i := range 4 {
		d.register(fmt.Sprintf("one of many %d", i))
	}
	var seen []string
	pages := 0
	for p := ec2.NewDescribeImagesPaginator(d.alice, &ec2.DescribeImagesInput{Owners: []string{"self"}}, func(o *ec2.DescribeImagesPaginatorOptions) { o.Limit = 3 }); p.HasMorePages(); pages++ {
		out, err := p.NextPage(d.ctx)
		if err != nil {
			d.fault("a page of images: %v", err)
			return
		}
		for _, m := range out.Images {
			seen = append(seen, aws.ToString(m.ImageId))
		}
	}
	var whole []string
	for _, m := range done(d.alice, c.DescribeImages, &ec2.DescribeImagesInput{Owners: []string{"self"}}).Images {
		whole = append(whole, aws.ToString(m.ImageId))
	}
	if !slices.Equal(seen, whole) || pages < 3 {
		d.fault("%d images on %d pages, %d at once", len(seen), pages, len(whole))
	}
	refused(d.alice, "InvalidPaginationToken", c.DescribeImages, &ec2.DescribeImagesInput{NextToken: aws.String("AAAA")})
	refused(d.alice, "InvalidParameterValue", c.DescribeImages, &ec2.DescribeImagesInput{MaxResults: aws.Int32(1001)})
}
