package ec2api

import (
	"context"
	"slices"

	"github.com/instar-image/instar/upload/catalog"
)

type describeRegions struct {
	dry
	RegionName []string
	AllRegions bool // all there are have been opted in to
	Filter     []filter
}

type regionItem struct {
	RegionName     string `xml:"regionName"`
	RegionEndpoint string `xml:"regionEndpoint"`
	OptInStatus    string `xml:"optInStatus"`
}

type describeRegionsReply struct {
	head
	RegionInfo items[regionItem] `xml:"regionInfo"`
}

const optedIn = "opt-in-not-required"

func (s *Server) describeRegions(_ context.Context, c *call, in *describeRegions) (reply, error) {
	match, err := newMatcher(in.Filter, "region-name", "endpoint", "opt-in-status")
	if err != nil {
		return nil, err
	}
	own := Region{s.o.Region, s.o.Endpoint}
	if own.Endpoint == "" {
		own.Endpoint = c.host
	}
	out := &describeRegionsReply{}
	var names []string
	for _, r := range append([]Region{own}, s.o.Regions...) {
		names = append(names, r.Name)
		if len(in.RegionName) > 0 && !slices.Contains(in.RegionName, r.Name) || !match.all(func(name string) []string {
			return map[string][]string{"region-name": {r.Name}, "endpoint": {r.Endpoint}, "opt-in-status": {optedIn}}[name]
		}) {
			continue
		}
		out.RegionInfo.Item = append(out.RegionInfo.Item, regionItem{r.Name, r.Endpoint, optedIn})
	}
	for _, n := range in.RegionName {
		if !slices.Contains(names, n) {
			return nil, refuse(catalog.CodeParameterValue, "Invalid region provided: %.100s", n)
		}
	}
	return out, nil
}

type describeZones struct {
	dry
	ZoneName             []string
	ZoneID               []string `q:"ZoneId"`
	AllAvailabilityZones bool     // all there are are available
	Filter               []filter
}

type zoneItem struct {
	ZoneName           string `xml:"zoneName"`
	ZoneState          string `xml:"zoneState"`
	RegionName         string `xml:"regionName"`
	OptInStatus        string `xml:"optInStatus"`
	ZoneID             string `xml:"zoneId"`
	GroupName          string `xml:"groupName"`
	NetworkBorderGroup string `xml:"networkBorderGroup"`
	ZoneType           string `xml:"zoneType"`
}

type describeZonesReply struct {
	head
	AvailabilityZoneInfo items[zoneItem] `xml:"availabilityZoneInfo"`
}

func (s *Server) describeZones(_ context.Context, _ *call, in *describeZones) (reply, error) {
	match, err := newMatcher(in.Filter, "zone-name", "zone-id", "state", "region-name", "opt-in-status", "group-name", "zone-type")
	if err != nil {
		return nil, err
	}
	for _, n := range slices.Concat(in.ZoneName, in.ZoneID) {
		if !slices.Contains(s.o.Zones, n) {
			return nil, refuse(catalog.CodeParameterValue, "Invalid availability zone: [%.100s]", n)
		}
	}
	out := &describeZonesReply{}
	for _, z := range s.o.Zones {
		if len(in.ZoneName) > 0 && !slices.Contains(in.ZoneName, z) || len(in.ZoneID) > 0 && !slices.Contains(in.ZoneID, z) ||
			!match.all(func(name string) []string {
				return map[string][]string{
					"zone-name": {z}, "zone-id": {z}, "state": {"available"}, "region-name": {s.o.Region},
					"opt-in-status": {optedIn}, "group-name": {s.o.Region}, "zone-type": {"availability-zone"},
				}[name]
			}) {
			continue
		}
		out.AvailabilityZoneInfo.Item = append(out.AvailabilityZoneInfo.Item, zoneItem{z, "available", s.o.Region, optedIn, z, s.o.Region, s.o.Region, "availability-zone"})
	}
	return out, nil
}

type getCallerIdentity struct{}

type getCallerIdentityReply struct {
	Result struct {
		Arn     string
		UserID  string `xml:"UserId"`
		Account string
	} `xml:"GetCallerIdentityResult"`
	RequestID string `xml:"ResponseMetadata>RequestId"`
}

func (r *getCallerIdentityReply) setRequestID(id string) { r.RequestID = id }

func (s *Server) getCallerIdentity(_ context.Context, c *call, _ *getCallerIdentity) (reply, error) {
	out := &getCallerIdentityReply{}
	out.Result.Arn = "arn:aws:iam::" + c.account.id + ":user/" + c.key
	out.Result.UserID, out.Result.Account = c.key, c.account.id
	return out, nil
}
