//go:build !unix

package uboot

import "context"

// lockFiles does nothing: U-Boot's tools do not exist here.
func lockFiles(context.Context, []string) (func(), error) { return func() {}, nil }
