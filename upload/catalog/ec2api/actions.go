package ec2api

import (
	"context"
	"maps"
	"slices"
)

// actions are those of the API, by name.
func actions() map[string]action {
	return map[string]action{
		"RegisterImage":          bound(changes[registerImage], (*Server).registerImage),
		"CreateImage":            bound(changes[createImage], (*Server).createImage),
		"CopyImage":              bound(changes[copyImage], (*Server).copyImage),
		"DeregisterImage":        bound(changes[deregisterImage], (*Server).deregisterImage),
		"DescribeImages":         bound(reads[describeImages], (*Server).describeImages),
		"DescribeImageAttribute": bound(reads[describeImageAttribute], (*Server).describeImageAttribute),
		"ModifyImageAttribute":   bound(changes[modifyImageAttribute], (*Server).modifyImageAttribute),
		"ResetImageAttribute":    bound(changes[resetImageAttribute], (*Server).resetImageAttribute),

		"EnableImage":                          bound(changes[imageOnly], (*Server).enableImage),
		"DisableImage":                         bound(changes[imageOnly], (*Server).disableImage),
		"EnableImageDeprecation":               bound(changes[enableImageDeprecation], (*Server).enableImageDeprecation),
		"DisableImageDeprecation":              bound(changes[imageOnly], (*Server).disableImageDeprecation),
		"EnableImageDeregistrationProtection":  bound(changes[enableProtection], (*Server).enableProtection),
		"DisableImageDeregistrationProtection": bound(changes[imageOnly], (*Server).disableProtection),
		"CancelImageLaunchPermission":          bound(changes[imageOnly], (*Server).cancelImageLaunchPermission),

		"CreateTags":   bound(changes[createTags], (*Server).createTags),
		"DeleteTags":   bound(changes[deleteTags], (*Server).deleteTags),
		"DescribeTags": bound(reads[describeTags], (*Server).describeTags),

		"CreateKeyPair":    bound(changes[createKeyPair], (*Server).createKeyPair),
		"ImportKeyPair":    bound(changes[importKeyPair], (*Server).importKeyPair),
		"DescribeKeyPairs": bound(reads[describeKeyPairs], (*Server).describeKeyPairs),
		"DeleteKeyPair":    bound(changes[deleteKeyPair], (*Server).deleteKeyPair),

		"DescribeRegions":           bound(reads[describeRegions], (*Server).describeRegions),
		"DescribeAvailabilityZones": bound(reads[describeZones], (*Server).describeZones),

		"BundleInstance":      bound(changes[bundleInstance], (*Server).bundleInstance),
		"DescribeBundleTasks": bound(reads[describeBundleTasks], (*Server).describeBundleTasks),
		"CancelBundleTask":    bound(changes[cancelBundleTask], (*Server).cancelBundleTask),

		"CreateStoreImageTask":    bound(changes[createStoreImageTask], (*Server).createStoreImageTask),
		"DescribeStoreImageTasks": bound(reads[describeStoreImageTasks], (*Server).describeStoreImageTasks),
		"CreateRestoreImageTask":  bound(changes[createRestoreImageTask], (*Server).createRestoreImageTask),

		"GetCallerIdentity": bound(reads[getCallerIdentity], (*Server).getCallerIdentity).of(serviceSTS),
	}
}

// bound makes an action of a method.
func bound[In any](kind func(func(context.Context, *call, *In) (reply, error)) action, f func(*Server, context.Context, *call, *In) (reply, error)) action {
	return kind(func(ctx context.Context, c *call, in *In) (reply, error) { return f(c.Server, ctx, c, in) })
}

// of is the action as another service's.
func (a action) of(service string) action {
	a.service = service
	return a
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
