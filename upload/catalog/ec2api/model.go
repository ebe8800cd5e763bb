package ec2api

import (
	"time"

	"github.com/instar-image/instar/upload/catalog"
)

// The elements of images as EC2's model has them, in its order.

type imageItem struct {
	ImageID                  string              `xml:"imageId"`
	ImageLocation            string              `xml:"imageLocation,omitempty"`
	ImageState               string              `xml:"imageState"`
	ImageOwnerID             string              `xml:"imageOwnerId"`
	ImageOwnerAlias          string              `xml:"imageOwnerAlias,omitempty"`
	CreationDate             string              `xml:"creationDate"`
	IsPublic                 bool                `xml:"isPublic"`
	ProductCodes             *items[productCode] `xml:"productCodes"`
	Architecture             string              `xml:"architecture"`
	ImageType                string              `xml:"imageType"`
	KernelID                 string              `xml:"kernelId,omitempty"`
	RamdiskID                string              `xml:"ramdiskId,omitempty"`
	Platform                 string              `xml:"platform,omitempty"`
	PlatformDetails          string              `xml:"platformDetails,omitempty"`
	UsageOperation           string              `xml:"usageOperation,omitempty"`
	Name                     string              `xml:"name,omitempty"`
	Description              string              `xml:"description,omitempty"`
	RootDeviceType           string              `xml:"rootDeviceType"`
	RootDeviceName           string              `xml:"rootDeviceName,omitempty"`
	BlockDeviceMapping       items[blockDevice]  `xml:"blockDeviceMapping"`
	VirtualizationType       string              `xml:"virtualizationType"`
	Hypervisor               string              `xml:"hypervisor"`
	EnaSupport               bool                `xml:"enaSupport,omitempty"`
	SriovNetSupport          string              `xml:"sriovNetSupport,omitempty"`
	BootMode                 string              `xml:"bootMode,omitempty"`
	TpmSupport               string              `xml:"tpmSupport,omitempty"`
	ImdsSupport              string              `xml:"imdsSupport,omitempty"`
	DeprecationTime          string              `xml:"deprecationTime,omitempty"`
	DeregistrationProtection string              `xml:"deregistrationProtection,omitempty"`
	StateReason              *stateReason        `xml:"stateReason"`
	SourceImageID            string              `xml:"sourceImageId,omitempty"`
	SourceImageRegion        string              `xml:"sourceImageRegion,omitempty"`
	SourceInstanceID         string              `xml:"sourceInstanceId,omitempty"`
	LastLaunchedTime         string              `xml:"lastLaunchedTime,omitempty"`
	TagSet                   *items[tagItem]     `xml:"tagSet"`
}

type productCode struct {
	ProductCode string `xml:"productCode"`
	Type        string `xml:"type"`
}

type stateReason struct {
	Code    string `xml:"code"`
	Message string `xml:"message"`
}

type blockDevice struct {
	DeviceName  string  `xml:"deviceName"`
	VirtualName string  `xml:"virtualName,omitempty"`
	NoDevice    *string `xml:"noDevice"`
	Ebs         *ebs    `xml:"ebs"`
}

type ebs struct {
	SnapshotID          string `xml:"snapshotId,omitempty"`
	VolumeSize          int64  `xml:"volumeSize,omitempty"`
	DeleteOnTermination bool   `xml:"deleteOnTermination"`
	VolumeType          string `xml:"volumeType,omitempty"`
	Iops                int64  `xml:"iops,omitempty"`
	Encrypted           bool   `xml:"encrypted"`
	KmsKeyID            string `xml:"kmsKeyId,omitempty"`
	Throughput          int64  `xml:"throughput,omitempty"`
}

type tagItem struct {
	Key   string `xml:"key"`
	Value string `xml:"value"`
}

func newTags(t catalog.Tags) []tagItem {
	var out []tagItem
	for _, k := range t.Sorted() {
		out = append(out, tagItem{k, t[k]})
	}
	return out
}

func newProductCodes(l []catalog.ProductCode) []productCode {
	var out []productCode
	for _, p := range l {
		out = append(out, productCode{p.Code, p.Type})
	}
	return out
}

func newBlockDevices(l []catalog.BlockDevice) []blockDevice {
	var out []blockDevice
	for _, b := range l {
		d := blockDevice{DeviceName: b.Device, VirtualName: b.Virtual}
		if b.NoDevice {
			d.NoDevice = new(string)
		}
		if e := b.EBS; e != nil {
			d.Ebs = &ebs{
				SnapshotID: e.SnapshotID, VolumeSize: e.VolumeSize, DeleteOnTermination: e.DeleteOnTermination, VolumeType: e.VolumeType,
				Iops: e.IOPS, Encrypted: e.Encrypted, KmsKeyID: e.KmsKeyID, Throughput: e.Throughput,
			}
		}
		out = append(out, d)
	}
	return out
}

// newImage shows an image to an account. alias is its owner's, "" for none.
func newImage(m *catalog.Image, account, alias string, now time.Time) imageItem {
	i := imageItem{
		ImageID: m.ID, ImageLocation: location(m), ImageState: string(m.State), ImageOwnerID: m.Owner, ImageOwnerAlias: alias,
		CreationDate: timestamp(m.Created), IsPublic: m.Public, ProductCodes: someOf(newProductCodes(m.ProductCodes)),
		Architecture: m.Architecture, ImageType: m.Type, KernelID: m.Kernel, RamdiskID: m.Ramdisk, Platform: m.Platform,
		PlatformDetails: m.PlatformDetails, UsageOperation: m.UsageOperation, Name: m.Name, Description: m.Description,
		RootDeviceType: m.RootDeviceType, RootDeviceName: m.RootDeviceName, BlockDeviceMapping: listOf(newBlockDevices(m.BlockDevices)),
		VirtualizationType: m.VirtualizationType, Hypervisor: m.Hypervisor, EnaSupport: m.EnaSupport, SriovNetSupport: m.SriovNetSupport,
		BootMode: m.BootMode, TpmSupport: m.TpmSupport, ImdsSupport: m.ImdsSupport, DeprecationTime: timestamp(m.Deprecated),
		DeregistrationProtection: m.ProtectionText(now), SourceImageID: m.SourceImage, SourceImageRegion: m.SourceRegion,
	}
	if m.Reason != (catalog.Reason{}) {
		i.StateReason = &stateReason{m.Reason.Code, m.Reason.Message}
	}
	if m.Owner == account { // what others are not to know
		i.TagSet = someOf(newTags(m.Tags))
		i.SourceInstanceID, i.LastLaunchedTime = m.SourceInstance, timestamp(m.LastLaunched)
	}
	return i
}

// location is where an image is, with its owner in front if it is no bundle, as
// EC2 shows it.
func location(m *catalog.Image) string {
	if m.Location != "" {
		return m.Location
	}
	return m.Owner + "/" + m.Name
}
