SUPPORTING_TASK_LIST = ["classification", "segmentation", "detection", "pose_estimation"]
