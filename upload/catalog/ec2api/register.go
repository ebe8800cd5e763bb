package ec2api

import (
	"context"
	"strings"

	"github.com/instar-image/instar/upload/catalog"
)

type mappingParam struct {
	DeviceName  string
	VirtualName string
	NoDevice    *string
	Ebs         *struct {
		SnapshotID          string `q:"SnapshotId"`
		VolumeSize          int64
		VolumeType          string
		DeleteOnTermination *bool
		Iops                int64
		Throughput          int64
		Encrypted           bool
		KmsKeyID            string `q:"KmsKeyId"`
	}
}

func mappings(l []mappingParam) ([]catalog.BlockDevice, error) {
	var out []catalog.BlockDevice
	for _, p := range l {
		b := catalog.BlockDevice{Device: p.DeviceName, Virtual: p.VirtualName, NoDevice: p.NoDevice != nil}
		if p.DeviceName == "" {
			return nil, refuse(catalog.CodeMissing, "The request must contain the parameter deviceName of every block device mapping")
		}
		if e := p.Ebs; e != nil {
			b.EBS = &catalog.EBS{
				SnapshotID: e.SnapshotID, VolumeSize: e.VolumeSize, VolumeType: e.VolumeType, Encrypted: e.Encrypted, IOPS: e.Iops,
				Throughput: e.Throughput, KmsKeyID: e.KmsKeyID, DeleteOnTermination: e.DeleteOnTermination == nil || *e.DeleteOnTermination,
			}
		}
		n := 0
		for _, is := range []bool{b.Virtual != "", b.NoDevice, b.EBS != nil} {
			if is {
				n++
			}
		}
		if n != 1 {
			return nil, refuse(catalog.CodeBlockDevice, "The block device mapping of %.100s must have one of VirtualName, NoDevice and Ebs", p.DeviceName)
		}
		out = append(out, b)
	}
	return out, nil
}

type registerImage struct {
	dry
	Name               string
	ImageLocation      string
	Description        string
	Architecture       string
	KernelID           string `q:"KernelId"`
	RamdiskID          string `q:"RamdiskId"`
	RootDeviceName     string
	VirtualizationType string
	BlockDeviceMapping []mappingParam
	SriovNetSupport    string
	EnaSupport         bool
	BootMode           string
	TpmSupport         string
	UefiData           string
	ImdsSupport        string
	BillingProduct     []string
	TagSpecification   []tagSpecification
}

type imageIDReply struct {
	head
	ImageID string `xml:"imageId"`
}

// mayRegister says whether the account may have what lies at a location
// registered as its own: BUCKET/KEY of a bundle's manifest, or NAME or
// NAME@VERSION of an Instar image in the catalog's own store.
func (a *account) mayRegister(location string) error {
	if bucket, _, bundle := strings.Cut(location, "/"); bundle {
		if !a.uses(bucket) {
			return refuse(catalog.CodeAuthFailure, "Not authorized for images: the account may not register images from the bucket %.100q", bucket)
		}
		return nil
	}
	name, _, _ := strings.Cut(strings.TrimPrefix(location, "instar:"), "@")
	if !anyMatch(a.images, name) {
		return refuse(catalog.CodeAuthFailure, "Not authorized for images: the account may not register the store's image %.100q", name)
	}
	return nil
}

func (s *Server) registerImage(ctx context.Context, c *call, in *registerImage) (reply, error) {
	tags, err := tagsOf(in.TagSpecification, "image", "snapshot")
	if err != nil {
		return nil, err
	}
	devices, err := mappings(in.BlockDeviceMapping)
	if err != nil {
		return nil, err
	}
	m := catalog.Image{
		Name: in.Name, Description: in.Description, Location: strings.TrimPrefix(in.ImageLocation, "/"), Architecture: in.Architecture,
		Kernel: in.KernelID, Ramdisk: in.RamdiskID, RootDeviceName: in.RootDeviceName, VirtualizationType: in.VirtualizationType,
		BlockDevices: devices, SriovNetSupport: in.SriovNetSupport, EnaSupport: in.EnaSupport, BootMode: in.BootMode,
		TpmSupport: in.TpmSupport, UefiData: in.UefiData, ImdsSupport: in.ImdsSupport, BillingProducts: in.BillingProduct, Tags: tags,
	}
	if m.Location != "" {
		if err := c.account.mayRegister(m.Location); err != nil {
			return nil, err
		}
	}
	made, err := s.o.Catalog.Register(ctx, c.as(in.DryRun), catalog.Registration{Image: m, Check: s.unbundled})
	if err != nil {
		return nil, err
	}
	return &imageIDReply{ImageID: made.ID}, nil
}

type deregisterImage struct {
	imageOnly
	DeleteAssociatedSnapshots bool
}

type deregisterImageReply struct {
	head
	Return                  bool        `xml:"return"`
	DeleteSnapshotResultSet *items[any] `xml:"deleteSnapshotResultSet"`
}

func (s *Server) deregisterImage(ctx context.Context, c *call, in *deregisterImage) (reply, error) {
	out := &deregisterImageReply{Return: true}
	if in.DeleteAssociatedSnapshots { // an image here has none
		out.DeleteSnapshotResultSet = &items[any]{}
	}
	return out, s.o.Catalog.Deregister(ctx, c.as(in.DryRun), in.ImageID)
}
