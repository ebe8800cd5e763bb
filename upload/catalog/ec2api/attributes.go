package ec2api

import (
	"context"
	"strings"
	"time"

	"github.com/instar-image/instar/upload/catalog"
)

type describeImageAttribute struct {
	dry
	ImageID   string `q:"ImageId!"`
	Attribute string `q:"Attribute!"`
}

type permissionItem struct {
	Group                 string `xml:"group,omitempty"`
	UserID                string `xml:"userId,omitempty"`
	OrganizationArn       string `xml:"organizationArn,omitempty"`
	OrganizationalUnitArn string `xml:"organizationalUnitArn,omitempty"`
}

// describeImageAttributeReply has one of the attributes.
type describeImageAttributeReply struct {
	head
	ImageID                  string                 `xml:"imageId"`
	LaunchPermission         *items[permissionItem] `xml:"launchPermission"`
	ProductCodes             *items[productCode]    `xml:"productCodes"`
	BlockDeviceMapping       *items[blockDevice]    `xml:"blockDeviceMapping"`
	Description              *value                 `xml:"description"`
	Kernel                   *value                 `xml:"kernel"`
	Ramdisk                  *value                 `xml:"ramdisk"`
	SriovNetSupport          *value                 `xml:"sriovNetSupport"`
	BootMode                 *value                 `xml:"bootMode"`
	TpmSupport               *value                 `xml:"tpmSupport"`
	UefiData                 *value                 `xml:"uefiData"`
	LastLaunchedTime         *value                 `xml:"lastLaunchedTime"`
	ImdsSupport              *value                 `xml:"imdsSupport"`
	DeregistrationProtection *value                 `xml:"deregistrationProtection"`
}

func (s *Server) describeImageAttribute(ctx context.Context, c *call, in *describeImageAttribute) (reply, error) {
	out := &describeImageAttributeReply{ImageID: in.ImageID}
	err := s.o.Catalog.Read(ctx, func(v *catalog.View) error {
		m, err := v.Own(ctx, c.account.id, in.ImageID)
		if err != nil {
			return err
		}
		return out.set(m, in.Attribute, s.o.Now())
	})
	return out, err
}

func (out *describeImageAttributeReply) set(m *catalog.Image, attribute string, now time.Time) error {
	switch attribute {
	case "launchPermission":
		out.LaunchPermission = &items[permissionItem]{permissions(m)}
	case "productCodes":
		out.ProductCodes = &items[productCode]{newProductCodes(m.ProductCodes)}
	case "blockDeviceMapping":
		out.BlockDeviceMapping = &items[blockDevice]{newBlockDevices(m.BlockDevices)}
	case "description":
		out.Description = &value{m.Description}
	case "kernel":
		out.Kernel = &value{m.Kernel}
	case "ramdisk":
		out.Ramdisk = &value{m.Ramdisk}
	case "sriovNetSupport":
		out.SriovNetSupport = &value{m.SriovNetSupport}
	case "bootMode":
		out.BootMode = &value{m.BootMode}
	case "tpmSupport":
		out.TpmSupport = &value{m.TpmSupport}
	case "uefiData":
		out.UefiData = &value{m.UefiData}
	case "lastLaunchedTime":
		out.LastLaunchedTime = &value{timestamp(m.LastLaunched)}
	case "imdsSupport":
		out.ImdsSupport = &value{m.ImdsSupport}
	case "deregistrationProtection":
		out.DeregistrationProtection = &value{m.ProtectionText(now)}
	default:
		return refuse(catalog.CodeParameterValue, "value (%.100s) for parameter attribute is invalid. Unknown attribute.", attribute)
	}
	return nil
}

func permissions(m *catalog.Image) []permissionItem {
	var out []permissionItem
	if m.Public {
		out = append(out, permissionItem{Group: "all"})
	}
	for _, a := range m.LaunchAccounts {
		out = append(out, permissionItem{UserID: a})
	}
	for _, o := range m.LaunchOrgs {
		out = append(out, permissionItem{OrganizationArn: o})
	}
	for _, o := range m.LaunchOrgUnits {
		out = append(out, permissionItem{OrganizationalUnitArn: o})
	}
	return out
}

type permissionParam struct {
	Group                 string
	UserID                string `q:"UserId"`
	OrganizationArn       string
	OrganizationalUnitArn string
}

// modifyImageAttribute has two styles: one names the attribute, an operation
// and what to add or remove; the other a structure per attribute.
type modifyImageAttribute struct {
	dry
	ImageID          string `q:"ImageId!"`
	LaunchPermission *struct {
		Add    []permissionParam
		Remove []permissionParam
	}
	Description *struct{ Value *string }
	ImdsSupport *struct{ Value *string }

	Attribute             string
	OperationType         string
	Value                 *string
	UserGroup             []string
	UserID                []string `q:"UserId"`
	OrganizationArn       []string
	OrganizationalUnitArn []string
	ProductCode           []string
}

func (s *Server) modifyImageAttribute(ctx context.Context, c *call, in *modifyImageAttribute) (reply, error) {
	change, err := in.change()
	if err != nil {
		return nil, err
	}
	return done(), change(ctx, s.o.Catalog, c.as(in.DryRun), in.ImageID)
}

type change func(ctx context.Context, k *catalog.Catalog, call catalog.Call, id string) error

// change finds the one attribute that the request is about.
func (in *modifyImageAttribute) change() (change, error) {
	var found []change
	if in.LaunchPermission != nil {
		add, err := gather(in.LaunchPermission.Add)
		if err != nil {
			return nil, err
		}
		remove, err := gather(in.LaunchPermission.Remove)
		if err != nil {
			return nil, err
		}
		found = append(found, launchPermission(add, remove))
	}
	if in.Description != nil && in.Description.Value != nil {
		found = append(found, description(*in.Description.Value))
	}
	if in.ImdsSupport != nil && in.ImdsSupport.Value != nil {
		found = append(found, imdsSupport(*in.ImdsSupport.Value))
	}
	// Packer sends a structure and, beside it, UserGroup.N and UserId.N without
	// an operation: those mean nothing.
	attribute := in.Attribute
	if attribute == "" && len(found) == 0 && len(in.ProductCode) > 0 {
		attribute = "productCodes"
	}
	if attribute == "" && in.OperationType != "" {
		attribute = "launchPermission"
	}
	if attribute != "" && !(len(found) > 0 && in.OperationType == "" && in.Value == nil) {
		ch, err := in.named(attribute)
		if err != nil {
			return nil, err
		}
		found = append(found, ch)
	}
	switch len(found) {
	case 0:
		return nil, refuse(catalog.CodeMissing, "No attributes specified.")
	case 1:
		return found[0], nil
	}
	return nil, refuse(catalog.CodeCombination, "Fields for multiple attribute types specified.")
}

// named is the style with Attribute.
func (in *modifyImageAttribute) named(attribute string) (change, error) {
	switch attribute {
	case "launchPermission":
		l, err := permissionsOf(in.UserGroup, in.UserID, in.OrganizationArn, in.OrganizationalUnitArn)
		if err != nil {
			return nil, err
		}
		switch in.OperationType {
		case "add":
			return launchPermission(l, catalog.Permissions{}), nil
		case "remove":
			return launchPermission(catalog.Permissions{}, l), nil
		case "":
			return nil, missing("OperationType")
		}
		return nil, refuse(catalog.CodeParameterValue, "value (%.100s) for parameter operationType is invalid: it must be add or remove", in.OperationType)
	case "productCodes":
		if len(in.ProductCode) == 0 {
			return nil, missing("ProductCode")
		}
		if in.OperationType == "remove" {
			return nil, refuse(catalog.CodeParameterValue, "Product codes cannot be removed.")
		}
		var codes []catalog.ProductCode
		for _, p := range in.ProductCode {
			codes = append(codes, catalog.ProductCode{Code: p, Type: "devpay"})
		}
		return func(ctx context.Context, k *catalog.Catalog, call catalog.Call, id string) error {
			return k.AddProductCodes(ctx, call, id, codes)
		}, nil
	case "description", "imdsSupport":
		if in.Value == nil {
			return nil, missing("Value")
		}
		if attribute == "description" {
			return description(*in.Value), nil
		}
		return imdsSupport(*in.Value), nil
	}
	return nil, refuse(catalog.CodeParameterValue, "value (%.100s) for parameter attribute is invalid. Unknown attribute, or one that cannot be changed.", attribute)
}

func description(s string) change {
	return func(ctx context.Context, k *catalog.Catalog, call catalog.Call, id string) error {
		return k.SetDescription(ctx, call, id, s)
	}
}

func imdsSupport(s string) change {
	return func(ctx context.Context, k *catalog.Catalog, call catalog.Call, id string) error {
		return k.SetIMDSSupport(ctx, call, id, s)
	}
}

// account12 is an account's id without the hyphens people write.
func account12(s string) string { return strings.ReplaceAll(s, "-", "") }

func gather(l []permissionParam) (p catalog.Permissions, err error) {
	for _, one := range l {
		n := 0
		for _, s := range []string{one.Group, one.UserID, one.OrganizationArn, one.OrganizationalUnitArn} {
			if s != "" {
				n++
			}
		}
		if n != 1 {
			return p, refuse(catalog.CodeAMIAttribute, "A launch permission names a group, an account, an organization or an organizational unit, and one of them.")
		}
		switch {
		case one.Group != "":
			err = addGroup(&p, one.Group)
		case one.UserID != "":
			p.Accounts = append(p.Accounts, account12(one.UserID))
		case one.OrganizationArn != "":
			p.Orgs = append(p.Orgs, one.OrganizationArn)
		default:
			p.OrgUnits = append(p.OrgUnits, one.OrganizationalUnitArn)
		}
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

func addGroup(p *catalog.Permissions, group string) error {
	if group != "all" {
		return refuse(catalog.CodeAMIAttribute, "Invalid attribute item value \"%.100s\" for group item type.", group)
	}
	p.Public = true
	return nil
}

func permissionsOf(groups, users, orgs, units []string) (catalog.Permissions, error) {
	p := catalog.Permissions{Orgs: orgs, OrgUnits: units}
	for _, g := range groups {
		if err := addGroup(&p, g); err != nil {
			return p, err
		}
	}
	for _, u := range users {
		p.Accounts = append(p.Accounts, account12(u))
	}
	return p, nil
}

func launchPermission(add, remove catalog.Permissions) change {
	return func(ctx context.Context, k *catalog.Catalog, call catalog.Call, id string) error {
		_, err := k.ModifyLaunchPermissions(ctx, call, id, add, remove)
		return err
	}
}

type resetImageAttribute struct {
	dry
	ImageID   string `q:"ImageId!"`
	Attribute string `q:"Attribute!"`
}

func (s *Server) resetImageAttribute(ctx context.Context, c *call, in *resetImageAttribute) (reply, error) {
	if in.Attribute != "launchPermission" {
		return nil, refuse(catalog.CodeParameterValue, "value (%.100s) for parameter attribute is invalid: only launchPermission can be reset.", in.Attribute)
	}
	return done(), s.o.Catalog.ResetLaunchPermissions(ctx, c.as(in.DryRun), in.ImageID)
}

// imageOnly is for actions that name an image and nothing else.
type imageOnly struct {
	dry
	ImageID string `q:"ImageId!"`
}

type enableImageDeprecation struct {
	imageOnly
	DeprecateAt time.Time `q:"DeprecateAt!"`
}

func (s *Server) enableImageDeprecation(ctx context.Context, c *call, in *enableImageDeprecation) (reply, error) {
	return done(), s.o.Catalog.SetDeprecation(ctx, c.as(in.DryRun), in.ImageID, in.DeprecateAt.Truncate(time.Second))
}

func (s *Server) disableImageDeprecation(ctx context.Context, c *call, in *imageOnly) (reply, error) {
	return done(), s.o.Catalog.SetDeprecation(ctx, c.as(in.DryRun), in.ImageID, time.Time{})
}

func (s *Server) enableImage(ctx context.Context, c *call, in *imageOnly) (reply, error) {
	return done(), s.o.Catalog.SetEnabled(ctx, c.as(in.DryRun), in.ImageID, true)
}

func (s *Server) disableImage(ctx context.Context, c *call, in *imageOnly) (reply, error) {
	return done(), s.o.Catalog.SetEnabled(ctx, c.as(in.DryRun), in.ImageID, false)
}

func (s *Server) cancelImageLaunchPermission(ctx context.Context, c *call, in *imageOnly) (reply, error) {
	return done(), s.o.Catalog.CancelLaunchPermission(ctx, c.as(in.DryRun), in.ImageID)
}

type enableProtection struct {
	imageOnly
	WithCooldown bool
}

type protectionReply struct {
	head
	Return string `xml:"return"`
}

func (s *Server) enableProtection(ctx context.Context, c *call, in *enableProtection) (reply, error) {
	state, err := s.o.Catalog.SetProtection(ctx, c.as(in.DryRun), in.ImageID, true, in.WithCooldown)
	return &protectionReply{Return: state}, err
}

func (s *Server) disableProtection(ctx context.Context, c *call, in *imageOnly) (reply, error) {
	state, err := s.o.Catalog.SetProtection(ctx, c.as(in.DryRun), in.ImageID, false, false)
	return &protectionReply{Return: state}, err
}
