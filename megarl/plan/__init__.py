"""Plans of a run: numbers in, frozen plan out. Nothing here touches a device."""
